"""A chain of kernels run on tensors."""

from collections.abc import Mapping
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from exporters.kernels.kernel import Chain, Step
from exporters.kernels.plan import ChooseTileConfig, Launch, TensorType, heuristic, plan, plan_step
from surgeon.dtypes import name_of


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def run(chain: Chain, tensors: Mapping[str, Tensor | None], choose: ChooseTileConfig = heuristic) -> tuple[Tensor, ...]:
    """The chain's outputs. `tensors`: its inputs, contiguous and on one device; None for those that are left out.

    It waits for nothing on the host, so it can be captured into a CUDA graph.
    """
    values = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    types = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in values.items())
    first = next(iter(values.values()))
    with torch.cuda.device_of(first):  # Triton launches on the current device
        launches = _planned(chain, types, choose, first.device)
        for number, planned in enumerate(launches):
            inputs = {name: values[planned.step.inputs[name]] for name in planned.inputs}
            launches[number], outputs = _fitting(planned, inputs)
            values |= {value: outputs[name] for name, value in planned.step.outputs.items()}
    return tuple(values[name] for name in chain.outputs)


@lru_cache(maxsize=1024)
def _planned(
    chain: Chain,
    types: tuple[tuple[str, tuple[int, ...], torch.dtype], ...],
    choose: ChooseTileConfig,
    device: torch.device,
) -> list[Launch]:
    """The plan of a chain, kept: a decoding step asks for the same one at every token. What `choose` answers depends on
    the device."""
    return plan(chain, {name: TensorType(shape, name_of(dtype)) for name, shape, dtype in types}, choose)


def launch(step: Step, inputs: Mapping[str, Tensor], choose: ChooseTileConfig = heuristic) -> dict[str, Tensor]:
    """One kernel -> its outputs by name."""
    with torch.cuda.device_of(next(iter(inputs.values()))):
        planned = plan_step(step, {name: type_of(tensor) for name, tensor in inputs.items()}, choose)
        return _fitting(planned, inputs)[1]


def clear_cache() -> None:
    """Drop the plans that are kept: tile configs were measured since."""
    _planned.cache_clear()


def _fitting(planned: Launch, inputs: Mapping[str, Tensor]) -> tuple[Launch, dict[str, Tensor]]:
    """A launch and its outputs, with fewer stages where the GPU has too little shared memory for those planned."""
    while True:
        try:
            return planned, _launch(planned, inputs)
        except OutOfResources:
            if planned.tile_config.num_stages == 1:
                raise
            planned = planned.with_fewer_stages()


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
            num_warps=planned.tile_config.num_warps,
            num_stages=planned.tile_config.num_stages,
        )
    return outputs


def type_of(tensor: Tensor) -> TensorType:
    return TensorType(tuple(tensor.shape), name_of(tensor.dtype))


def contiguous(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """As kernels read tensors: in order."""
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()}
