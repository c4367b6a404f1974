"""`surgeon generate`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from commands._options import backend_option, json_option, positions_option, print_json, provider_of

if TYPE_CHECKING:
    from surgeon.generation import Generation


@click.command("generate")
@click.argument("path", metavar="CKPT|BUNDLE|ENGINES")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="An image; repeat for more.")
@click.option("--prompt", required=True, help="What to ask.")
@click.option("--system", help="The system prompt.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Tokens of the answer at most."
)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default="0 = greedy", help="Sampling temperature."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the most likely tokens whose probabilities sum to P.",
)
@click.option("--top-k", type=click.IntRange(1), help="Sample from the K most likely tokens.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the sampling.")
@positions_option
@click.option(
    "--memory",
    type=click.Choice(["auto", "off", "always"]),
    help="Of a model that calls for memory: when it says so (auto, the default), never, or at the beginning and behind "
    "each sentence or line.",
)
@click.option("--max-invocations", type=click.IntRange(0), help="Calls for memory in an answer at most (default 8).")
@click.option("--trace", is_flag=True, help="Tell on stderr where the model called for memory, and how long it took.")
@backend_option
@json_option
def generate(
    path: str,
    images: tuple[Path, ...],
    prompt: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    positions: Literal["dhr", "plain"] | None,
    memory: Literal["auto", "off", "always"] | None,
    max_invocations: int | None,
    trace: bool,
    backend: str | None,
    as_json: bool,
) -> None:
    """Answer a prompt about images, with any form of a model.

    A checkpoint runs in torch, a bundle in ONNX Runtime, engines in TensorRT. The text is streamed to stdout. Images
    are shown to the model in the order in which they are named.

    \b
    surgeon generate CKPT --image cat.png --prompt "What is this?"
    surgeon generate BUNDLE --image a.png --image b.png --prompt "Compare them."
    surgeon generate PATCHED --image chart.png --prompt "Explain." --memory always --trace
    """
    if not temperature and (top_p is not None or top_k is not None):
        raise click.UsageError("--top-p and --top-k shape sampling, and without --temperature nothing is sampled")
    from surgeon.generation import Sampling
    from surgeon.inputs import Prompt

    request, sampling = Prompt(prompt, images, system), Sampling(temperature, top_k, top_p, seed)

    from exporters.generation import open_generator

    def show(row: int, text: str) -> None:
        if not as_json:
            click.echo(text, nl=False)

    generator = open_generator(path, provider_of(backend, path))
    (generation,) = generator.generate(
        [request], max_new_tokens, sampling, show, positions, memory=memory, max_invocations=max_invocations
    )
    print_json(dataclasses.asdict(generation)) if as_json else click.echo()
    if trace:
        click.echo(_trace(generation), err=True)


def _trace(generation: "Generation") -> str:
    """A line for each call for memory."""
    lines = [
        f"{each.kind} memory behind token {each.token} of {len(generation.token_ids)}: {each.seconds * 1e3:.1f} ms"
        for each in generation.invocations
    ]
    return "\n".join(lines or ["the model called for no memory"])


COMMAND = generate
