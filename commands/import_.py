"""`surgeon import`."""

import dataclasses
from pathlib import Path

import click

from commands._options import json_option, print_json


@click.command("import")
@click.argument("source", metavar="CKPT")
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--image-token-id",
    type=click.IntRange(0),
    help="The id of the token that images take the place of, for a checkpoint without a tokenizer.  [default: where "
    "published checkpoints have <IMG_CONTEXT>]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the new one is complete.")
@json_option
def import_command(source: str, target: Path, image_token_id: int | None, overwrite: bool, as_json: bool) -> None:
    """Convert a checkpoint of another layout to transformers' own.

    CKPT is an InternVL as published (internvl_chat; InternLM2, Qwen2, Qwen3 or Llama inside), which becomes
    transformers' internvl, a CoMemo (comemo_chat), which becomes that with mixin layers and RoPE-DHR, or a Qwen3-VL
    with PVM as its authors publish it (pvm_qwen3_vl), which becomes a patched one. Its Python is never run. Values and
    dtype are kept, tensors streamed one at a time; tokenizer, chat template and image processor come along. OUT appears
    complete or not at all.

    \b
    surgeon import ./InternVL2-2B ./internvl2-2b
    surgeon import ./CoMemo-2B ./comemo-2b
    surgeon import ./PVM-8B ./pvm-8b
    """
    from rich.filesize import decimal

    from surgeon.importing import import_checkpoint
    from surgeon.progress import progress_bars

    with progress_bars() as progress:
        report = import_checkpoint(
            source, target, image_token_id=image_token_id, overwrite=overwrite, progress=progress
        )
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        print_json({"target": str(target), **dataclasses.asdict(report)})
        return
    click.echo(f"wrote {target}: {report.model_type} ({report.text_model} inside), {decimal(report.bytes_written)}")
    click.echo(f"{report.parameters:,} parameters in {report.tensors:,} tensors")
    for kind, layers in report.grafts.items():
        click.echo(f"grafted {kind} at layers {', '.join(map(str, layers))}")


COMMAND = import_command
