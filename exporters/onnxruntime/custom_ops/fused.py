"""A graph's grafts by fused kernels, and their registration with ONNX Runtime."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import onnx_ir as ir
import onnxruntime as ort
import torch

from exporters.fusion.fused_kernels import FusedKernels
from exporters.fusion.node import KernelNode, compile_nodes, variant_specs
from exporters.kernels import tuned
from exporters.kernels.aot import capability_for
from exporters.kernels.folder import compiled
from exporters.kernels.plan import ChooseTileConfig, heuristic
from exporters.kernels.support import reason_against_device
from exporters.onnxruntime.custom_ops import native
from exporters.onnxruntime.custom_ops.tables import Table, table

_TOKENS, _SLOTS = 1024, 1024
"""What launches are cut for: nothing says how long prompts and memories will be."""
_GPU = 0
"""ONNX Runtime's, where a session does not say."""
_MOST = {"S": 4096, "M": 4096}
"""Up to here what attention leaves behind is kept small; larger requests take more in proportion."""


@dataclass(frozen=True)
class Device:
    """Where the kernels run."""

    capability: int
    """What they are compiled for: 89 for 8.9."""
    provider: str = "CUDAExecutionProvider"
    driver: str = "libcuda.so.1"
    alignment: int = 16
    """Bytes of which every address is a multiple: those that ONNX Runtime and torch allocate on a GPU are."""
    choose: ChooseTileConfig = heuristic


@dataclass(frozen=True)
class Fused:
    """What a session needs that has kernel nodes; it lives as long as the session."""

    functions: Mapping[str, int]
    """How many calls of each function were replaced."""
    nodes: Mapping[str, KernelNode]
    """By operator."""
    table: Table
    """The operators in the same order."""

    def register(self, options: ort.SessionOptions) -> None:
        native.register(options, self.table)


@cache
def cuda_device() -> Device | None:
    """The GPU that ONNX Runtime takes, with tile configs as they were measured on it. None where kernels cannot run,
    with a warning, once."""
    reason = reason_against_device(_GPU)
    if reason is None:
        try:
            native.build()
        except native.CompilerError as error:
            reason = f"no fused kernels in ONNX Runtime: {error}"
    if reason is not None:
        warnings.warn(f"{reason}; standard operators stay", stacklevel=2)
        return None
    major, minor = torch.cuda.get_device_capability(_GPU)
    capability = capability_for(10 * major + minor)
    assert capability is not None
    return Device(capability, choose=tuned.choose)


def fuse(model: ir.Model, device: Device) -> Fused | None:
    """Replace the functions of grafts in `model` by kernel nodes; None where it has none. Functions that the kernels
    do not support stay, with a warning. Raises CompileError, and leaves `model` partly rewritten then."""
    symbols = {str(size) for value in model.graph.inputs for size in value.shape or () if not isinstance(size, int)}
    rewrite = FusedKernels(variant_specs(symbols, _TOKENS, _SLOTS), dict.fromkeys(symbols, 1) | _MOST, device.choose)
    rewrite(model)
    if not rewrite.replaced:
        return None
    aligned = device.alignment >= 16
    descriptions = compile_nodes(rewrite.nodes, [device.capability], compiled(), aligned=aligned)
    return Fused(
        rewrite.functions, rewrite.nodes, table(descriptions, device.provider, device.driver, device.alignment)
    )
