"""`surgeon export`."""

from pathlib import Path

import click

from commands._options import json_option, print_json


@click.command("export")
@click.argument("source", metavar="CKPT")
@click.argument("target", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    required=True,
    help="What the graphs compute in. Weights of another dtype are converted once; the others stay where they are.",
)
@click.option(
    "--max-length",
    type=click.IntRange(2),
    default=4096,
    show_default=True,
    help="Tokens that the key-value cache holds: prompt, images and answer together.",
)
@click.option(
    "--measure/--no-measure",
    default=True,
    help="fp16: run the graphs in fp32 over a few images and prompts, and keep in fp32 what would overflow. It takes "
    "the time of five prompts on this CPU.  [default: measure]",
)
@click.option(
    "--digests/--no-digests",
    default=True,
    help="Record the SHA-256 of the weight files, for `surgeon validate --bytes`. It takes the time of reading them "
    "once.  [default: digests]",
)
@click.option("--overwrite", is_flag=True, help="Replace BUNDLE, once the new one is complete.")
@json_option
def export(
    source: str,
    target: Path,
    dtype: str,
    max_length: int,
    measure: bool,
    digests: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint, plain or patched, as a bundle of ONNX graphs.

    BUNDLE becomes a directory with the graphs and everything that a runtime needs to know. Weights of the graphs' dtype
    are not copied where the file system can share them (reflinks, else hard links): a program that writes into one of
    the checkpoint's weight files in place would change the bundle too. Others are converted into a file of their own.

    \b
    surgeon export OUT BUNDLE --dtype fp16 --max-length 8192
    """
    from exporters.export import export_bundle
    from surgeon import console
    from surgeon.dtypes import PRECISIONS
    from surgeon.progress import progress_bars

    with progress_bars() as progress:
        manifest = export_bundle(
            source,
            target,
            dtype=PRECISIONS[dtype],
            max_length=max_length,
            overwrite=overwrite,
            progress=progress,
            measure=measure,
            digests=digests,
        )
    if measure and manifest.precision is not None and manifest.precision.skipped is not None:
        click.echo(f"warning: what overflows fp16 was not measured: {manifest.precision.skipped}", err=True)
    manifest_json = manifest.model_dump(mode="json")
    print_json(manifest_json) if as_json else console.report_bundle(target, manifest_json)


COMMAND = export
