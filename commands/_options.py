"""What several commands share: options, and what they mean."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import click

from exporters.artifact import artifact_kind

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


class RenamedOptions(click.Command):
    """A command that still takes the former names of its options, for one release, with a warning."""

    former: ClassVar[Mapping[str, str]] = {}
    """Former name -> name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [self._renamed(argument) for argument in args])

    def _renamed(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        if name not in self.former:
            return argument
        new = self.former[name]
        click.echo(f"warning: {name} is called {new} now; the former name goes with the next release", err=True)
        return new + equals + value


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def provider_of(backend: str | None, *paths: str) -> Any:
    """ONNX Runtime's provider that --backend names."""
    if backend is None:
        return "auto"
    if all(artifact_kind(path) != "bundle" for path in paths):
        raise click.UsageError(f"--backend {backend} is for bundles, and there is none among {', '.join(paths)}")
    return backend.removeprefix("ort-")
