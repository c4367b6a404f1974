"""`surgeon bench`."""

from pathlib import Path

import click

from commands._options import backend_option, json_option, print_json, provider_of


@click.command("bench")
@click.argument("paths", metavar="A B ...", nargs=-1, required=True)
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="An image; repeat for more.")
@click.option("--prompt", help="What to ask.  [default: to describe the image]")
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens of each answer.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Prompts at a time.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Measurements of each.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads of each.  [default: the library's]")
@backend_option
@click.option("--out", type=click.Path(path_type=Path), help="Draw the figures: a .png, .svg or .pdf file.")
@json_option
def bench(
    paths: tuple[str, ...],
    images: tuple[Path, ...],
    prompt: str | None,
    tokens: int,
    batch: int,
    rounds: int,
    threads: int | None,
    backend: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure latency, throughput and memory of forms side by side.

    A form is a checkpoint, a bundle or a directory of engines. Each is loaded in a process of its own, all at the same
    time, and they are measured in turns. The tokens are greedy and an answer does not end early. Without --image it is
    about an image of this tool's own.

    \b
    surgeon bench CKPT BUNDLE --tokens 128 --out bench.png
    """
    from exporters.bench import Workload, draw, measure
    from surgeon import console
    from surgeon.parity.cases import default_cases
    from surgeon.progress import progress_bars

    (own,) = default_cases()[0].prompts
    images = images or tuple(Path(str(image)) for image in own.images)
    provider = provider_of(backend, *paths)
    workload = Workload(prompt or own.text, images, tokens, batch, rounds, threads, provider)
    with progress_bars() as progress:
        measurements = measure(paths, workload, progress)
    if out is not None:
        draw(measurements, out)
    figures = [measurement.as_dict() for measurement in measurements]
    print_json(figures) if as_json else console.report_bench(figures)


COMMAND = bench
