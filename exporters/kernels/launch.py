"""A chain of kernels run on tensors."""

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from exporters.kernels.kernel import Chain, Step
from exporters.kernels.plan import ChooseBlocks, TensorType, by_rule, plan_step


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def run(chain: Chain, given: Mapping[str, Tensor | None], choose: ChooseBlocks = by_rule) -> tuple[Tensor, ...]:
    """The chain's outputs. `given`: its inputs, contiguous and on one device; None for those that are left out.

    It waits for nothing on the host, so it can be captured into a CUDA graph.
    """
    values = {name: tensor for name, tensor in given.items() if tensor is not None}
    for step in chain.steps:
        inputs = {name: values[value] for name, value in step.inputs.items() if value in values}
        found = launch(step, inputs, choose)
        values |= {value: found[name] for name, value in step.outputs.items()}
    return tuple(values[name] for name in chain.outputs)


def launch(step: Step, inputs: Mapping[str, Tensor], choose: ChooseBlocks = by_rule) -> dict[str, Tensor]:
    """One kernel -> its outputs by name."""
    kernel, device = step.kernel, next(iter(inputs.values())).device
    planned = plan_step(step, {name: type_of(tensor) for name, tensor in inputs.items()}, choose)
    outputs = {
        name: torch.empty(output.shape, dtype=getattr(torch, output.dtype), device=device)
        for name, output in planned.outputs.items()
    }
    if 0 not in planned.grid:
        kernel.function[planned.grid](
            *(inputs.get(name) for name in kernel.inputs),
            *planned.sizes.values(),
            *outputs.values(),
            **planned.constants,
            UPCAST=interpreting() and any(tensor.dtype == torch.bfloat16 for tensor in inputs.values()),
            num_warps=planned.blocks.num_warps,
            num_stages=planned.blocks.num_stages,
        )
    return outputs


def type_of(tensor: Tensor) -> TensorType:
    return TensorType(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def contiguous(given: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """As kernels read tensors: in order."""
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in given.items()}
