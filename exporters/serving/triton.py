"""An NVIDIA Triton Inference Server model repository around a directory of engines."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from exporters.tensorrt.errors import EngineError
from surgeon.checkpoint import share_file, staged

_T = TypeVar("_T")
CONFIG = "config.pbtxt"
VERSION = "1"
ENGINES = "engines"
"""The folder of a version that the engines are in."""
_INPUTS = (
    ("prompt", "TYPE_STRING", "1", False),
    ("images", "TYPE_STRING", "-1", True),  # files' bytes: PNG, JPEG, ...
    ("max_tokens", "TYPE_INT32", "1", True),
    ("temperature", "TYPE_FP32", "1", True),
    ("positions", "TYPE_STRING", "1", True),  # "dhr" or "plain"
)
_OUTPUTS = (("text", "TYPE_STRING", "1"), ("finish_reason", "TYPE_STRING", "1"))


def model_name(target: Path) -> str:
    """Of the model in a repository `target`: what clients ask for. Raises EngineError for a name without a letter."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", target.name).strip("._-")
    if not name:
        raise EngineError(f"{target} gives no name for the model; write to a directory with letters in its name")
    return name


def write_repository(
    target: Path, build: Callable[[Path], _T], *, overwrite: bool = False, protect: Path | None = None
) -> _T:
    """Write a model repository `target`, which appears whole or not at all:

        <target>/<name>/config.pbtxt
        <target>/<name>/1/model.py
        <target>/<name>/1/engines/          what `build` writes when it is called with this path

    -> what `build` gives. Raises TargetError for the target, and what `build` raises.
    """
    name = model_name(target)

    model = Path(__file__).with_name("triton_model.py")

    def verify(directory: Path) -> None:
        """`build` sees to the engines itself."""
        if (directory / name / VERSION / "model.py").read_bytes() != model.read_bytes():
            raise EngineError(f"{directory / name / VERSION / 'model.py'} is not what was copied there")

    with staged(target, overwrite, [] if protect is None else [protect], verify=verify) as directory:
        version = directory / name / VERSION
        version.mkdir(parents=True)
        built = build(version / ENGINES)
        share_file(model, version / "model.py", "copy")
        (directory / name / CONFIG).write_text(config(name))
    return built


def check_graphs(graphs: tuple[str, ...]) -> None:
    """Refuse a choice of graphs that cannot answer."""
    if graphs:
        raise EngineError(
            "--graph with --serve-layout: a server needs the engines of all graphs; leave --graph out, or build the "
            "engines alone"
        )


def config(name: str) -> str:
    """config.pbtxt: one request at a time, any number of responses to it."""
    inputs = ",\n".join(
        f'  {{ name: "{port}" data_type: {dtype} dims: [ {size} ]{" optional: true" if optional else ""} }}'
        for port, dtype, size, optional in _INPUTS
    )
    outputs = ",\n".join(
        f'  {{ name: "{port}" data_type: {dtype} dims: [ {size} ] }}' for port, dtype, size in _OUTPUTS
    )
    return f"""name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
{inputs}
]
output [
{outputs}
]
# the model chooses its device: the first that CUDA_VISIBLE_DEVICES leaves
instance_group [ {{ count: 1 kind: KIND_MODEL }} ]
version_policy {{ specific {{ versions: [ {VERSION} ] }} }}
"""
