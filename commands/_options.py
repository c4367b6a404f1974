"""What several commands share: options, and what they mean."""

import json
from typing import Any

import click

from exporters.forms import form_of

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else there.")
positions_option = click.option(
    "--positions",
    type=click.Choice(["dhr", "plain"]),
    help="For a model with RoPE-DHR: tiles at the ids of the thumbnail patches they cover (long contexts), or tokens "
    "one after the other (reading text).  [default: dhr]",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["ort-cpu", "ort-cuda", "ort-tensorrt-rtx"]),
    help="What ONNX Runtime computes a bundle with.  [default: CUDA where it works, else the CPU]",
)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def provider_of(backend: str | None, *paths: str) -> Any:
    """ONNX Runtime's provider that --backend names."""
    if backend is None:
        return "auto"
    if all(form_of(path) != "bundle" for path in paths):
        raise click.UsageError(f"--backend {backend} is for bundles, and there is none among {', '.join(paths)}")
    return backend.removeprefix("ort-")
