"""`surgeon validate`."""

import json
from pathlib import Path
from typing import Literal

import click

from commands._options import backend_option, json_option, positions_option, print_json, provider_of


@click.command("validate")
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="Your own image; repeat.")
@click.option("--prompt", help="Your own prompt, instead of the ones that come with the tool.")
@click.option(
    "--steps", type=click.IntRange(1), default=32, show_default=True, help="Tokens decoded after each prompt."
)
@click.option(
    "--backbone-tuned",
    is_flag=True,
    help="Of two checkpoints: the later may hold other values of the earlier one's tensors. What must hold then: its "
    "grafts, their gates closed, change nothing of its own backbone.",
)
@click.option(
    "--grafts-tuned",
    is_flag=True,
    help="Of two checkpoints: the later may hold other values of the grafts that both have. What must hold then: the "
    "same backbone, and with the gates of those grafts closed the same logits.",
)
@click.option(
    "--bytes",
    "bytes_too",
    is_flag=True,
    help="First compare every file with the digest recorded when it was written; of two forms, also check that one was "
    "made from the other. A bundle or engines alone get only this check.",
)
@positions_option
@backend_option
@click.option("--report", "report_file", type=click.Path(path_type=Path), help="Write the whole verdict as JSON.")
@click.option("--overwrite", is_flag=True, help="Replace the report file.")
@json_option
def validate(
    a: str,
    b: str | None,
    images: tuple[Path, ...],
    prompt: str | None,
    steps: int,
    backbone_tuned: bool,
    grafts_tuned: bool,
    bytes_too: bool,
    positions: Literal["dhr", "plain"] | None,
    backend: str | None,
    report_file: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Prove that a later form of a model computes what its source did.

    A and B are checkpoints, bundles or directories of engines. Compared are the logits over each prompt and over every
    decoding step, and the greedy tokens; a failure names the first layer that is wrong. What must hold depends on the
    two: a patch holds its source's tensors, and with its gates closed gives the source's logits bit for bit; an fp32
    bundle gives the checkpoint's to 1e-4 with the same tokens, fp16 and bf16 ones to stated bounds. Exits with 1 where
    it does not hold, and where nothing could be judged.

    \b
    surgeon validate CKPT PATCHED
    surgeon validate BUNDLE --bytes
    surgeon validate PATCHED BUNDLE --image cat.png --report report.json
    """
    from surgeon import console
    from surgeon.progress import progress_bars

    if report_file is not None:
        from surgeon.checkpoint import check_target

        check_target(report_file, overwrite, directory=False)
    if b is None and not bytes_too:
        raise click.UsageError("name two forms of a model, or with --bytes one")
    provider = provider_of(backend, a, *([] if b is None else [b]))
    from exporters.validation.validate import validate_bytes, validate_pair

    with progress_bars() as progress:
        if b is None:
            report = validate_bytes(a, progress=progress)
        else:
            report = validate_pair(
                a, b, images, prompt, steps, progress, positions, provider, backbone_tuned, grafts_tuned, bytes_too
            )
    if report_file is not None:
        from surgeon.checkpoint import staged_file

        with staged_file(report_file, overwrite) as staging:
            staging.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    print_json(report.to_json()) if as_json else console.report_validation(report)
    if not report.passed:
        click.get_current_context().exit(1)


COMMAND = validate
