"""A chain of kernels run on tensors."""

from collections.abc import Mapping
from functools import lru_cache

import torch
import triton
from torch import Tensor

from exporters.kernels.kernel import Chain, Step
from exporters.kernels.plan import ChooseBlocks, Launch, TensorType, by_rule, plan, plan_step


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def run(chain: Chain, given: Mapping[str, Tensor | None], choose: ChooseBlocks = by_rule) -> tuple[Tensor, ...]:
    """The chain's outputs. `given`: its inputs, contiguous and on one device; None for those that are left out.

    It waits for nothing on the host, so it can be captured into a CUDA graph.
    """
    values = {name: tensor for name, tensor in given.items() if tensor is not None}
    types = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in values.items())
    for planned in _planned(chain, types, choose):
        step = planned.step
        inputs = {name: values[step.inputs[name]] for name in planned.inputs}
        found = _launch(planned, inputs)
        values |= {value: found[name] for name, value in step.outputs.items()}
    return tuple(values[name] for name in chain.outputs)


@lru_cache(maxsize=1024)
def _planned(
    chain: Chain, types: tuple[tuple[str, tuple[int, ...], torch.dtype], ...], choose: ChooseBlocks
) -> list[Launch]:
    """The plan of a chain, kept: a decoding step asks for the same one at every token."""
    return plan(chain, {name: TensorType(shape, _name(dtype)) for name, shape, dtype in types}, choose)


def launch(step: Step, inputs: Mapping[str, Tensor], choose: ChooseBlocks = by_rule) -> dict[str, Tensor]:
    """One kernel -> its outputs by name."""
    return _launch(plan_step(step, {name: type_of(tensor) for name, tensor in inputs.items()}, choose), inputs)


def _launch(planned: Launch, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kernel, device = planned.step.kernel, next(iter(inputs.values())).device
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
    return TensorType(tuple(tensor.shape), _name(tensor.dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def contiguous(given: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """As kernels read tensors: in order."""
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in given.items()}
