"""`surgeon inspect`."""

from pathlib import Path

import click

from commands._options import json_option, print_json
from exporters.artifact import artifact_kind


@click.command("inspect")
@click.argument("path", metavar="CKPT|BUNDLE|ENGINES")
@json_option
@click.option("--image", type=click.Path(path_type=Path), help="An image whose token positions are drawn.")
@click.option("--out", type=click.Path(path_type=Path), help="The drawing: a .png, .svg or .pdf file.")
def inspect(path: str, as_json: bool, image: Path | None, out: Path | None) -> None:
    """Show what a checkpoint, a bundle or a directory of engines is.

    Of a checkpoint: family, sizes, where grafts can go, what is grafted, parameters per part. No weight is read, and a
    directory with a config.json alone is enough. With --image and --out, for a family that cuts images into tiles: a
    drawing of the image's tiles and thumbnail, coloured by position id.

    \b
    surgeon inspect ./Qwen3-VL-8B-Instruct
    surgeon inspect ./patched --json | jq '.grafts'
    surgeon inspect ./InternVL3-2B --image x.png --out positions.png
    """
    if (image is None) != (out is None):
        raise click.UsageError("--image and --out go together: the image, and the file to draw to")
    if image is not None and out is not None:
        from surgeon.positions_image import draw_positions

        click.echo(f"{image}: {draw_positions(Path(path), image, out).describe()}; drawn in {out}", err=as_json)
        return
    from surgeon import console

    if artifact_kind(path) == "engines":
        from exporters.tensorrt.report import inspect_engines

        engines = inspect_engines(path, show=not as_json)
        if as_json:
            print_json(engines.model_dump(mode="json"))
    elif artifact_kind(path) == "bundle":
        from exporters.onnx.manifest import Manifest

        manifest = Manifest.load(path).model_dump(mode="json")
        print_json(manifest) if as_json else console.report_bundle(path, manifest)
    else:
        from surgeon.inspect import inspect_checkpoint

        inspection = inspect_checkpoint(path)
        print_json(inspection.model_dump(mode="json")) if as_json else console.report_inspection(inspection)


COMMAND = inspect
