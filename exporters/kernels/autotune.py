"""Launches measured on the GPU that is here, for the grafts of a patched checkpoint; `tuned` keeps the results."""

import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.kernels.candidates import LEAST_SHARED_MEMORY, candidates
from exporters.kernels.kernel import Chain, Step, TileConfig
from exporters.kernels.plan import ChooseTileConfig, element_size, fixed_tile_configs
from exporters.kernels.tuned import Measured, keep, key
from surgeon.dtypes import name_of
from surgeon.errors import SurgeonError

Measure = Callable[[Sequence[Callable[[], object]]], float]
"""Runs that do the same on tensors of their own -> seconds of one."""


def tune(
    chain: Chain,
    tensors: Mapping[str, Tensor | None],
    measure: Measure,
    *,
    shared_memory: int = LEAST_SHARED_MEMORY,
    cache_bytes: int = 0,
    offer: Callable[..., list[TileConfig]] = candidates,
) -> dict[str, Measured]:
    """Measure every launch of a chain on these tensors -> the best of each, by `key`. `offer`: gives the tile
    configs to try for a launch, the rule's first, as `candidates` does.

    Each candidate runs on as many copies of its inputs as take three times `cache_bytes`: while a model decodes, a
    weight has left the GPU's cache before it is read again.
    """
    from exporters.kernels.launch import launch, type_of

    values = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    measurements: dict[str, Measured] = {}
    chosen: dict[str, TileConfig] = {}
    for number, step in enumerate(chain.steps):
        inputs = {name: values[value] for name, value in step.inputs.items() if value in values}
        types = {name: type_of(tensor) for name, tensor in inputs.items()}
        shapes = {name: tensor.shape for name, tensor in types.items()}
        choices = offer(step, shapes, element_size(types), shared_memory)
        output_shapes = {tuple(step.kernel.outputs(shapes, step.options, choice).items()) for choice in choices}
        steps = chain.steps[number:] if len(output_shapes) > 1 else (step,)
        copies = copies_of(steps, values, cache_bytes)
        times = {}
        for tile_config in choices:
            fixed = fixed_tile_configs({**chosen, step.name: tile_config})
            seconds = _try(measure, [partial(run_steps, steps, copy, fixed) for copy in copies])
            if seconds is not None:
                times[tile_config] = seconds
        if choices[0] not in times:
            raise SurgeonError(f"{step.name}: the rule's own tile configs {choices[0]} do not fit this GPU")
        best = min(times, key=lambda tile_config: times[tile_config])
        measurements[key(step, types)] = Measured(best, times[best], times[choices[0]], len(times))
        chosen[step.name] = best
        outputs = launch(step, inputs, fixed_tile_configs(chosen))
        values |= {value: outputs[name] for name, value in step.outputs.items()}
    return measurements


def run_steps(steps: Sequence[Step], tensors: Mapping[str, Tensor], choose: ChooseTileConfig) -> None:
    """Launch some of a chain's steps. `tensors`: the values that they read and do not compute."""
    from exporters.kernels.launch import launch

    values = dict(tensors)
    for step in steps:
        outputs = launch(step, {n: values[v] for n, v in step.inputs.items() if v in values}, choose)
        values |= {value: outputs[name] for name, value in step.outputs.items()}


def copies_of(steps: Sequence[Step], values: Mapping[str, Tensor], cache_bytes: int) -> list[dict[str, Tensor]]:
    """Copies of the values that the steps read and do not compute, three times `cache_bytes` in all: no cache holds
    them."""
    names = {value for step in steps for value in step.inputs.values() if value in values}
    size = sum(values[name].nbytes for name in names)
    count = max(1, min(256, -(-3 * cache_bytes // size)))
    return [{name: values[name].clone() for name in names} for _ in range(count)]


def _try(measure: Measure, runs: Sequence[Callable[[], object]]) -> float | None:
    """Seconds; None where the GPU has too little shared memory or registers for it."""
    from triton.runtime.errors import OutOfResources

    try:
        return measure(runs)
    except OutOfResources:
        return None


def in_cuda_graph(runs: Sequence[Callable[[], object]], repetitions: int = 15) -> list[float]:
    """Seconds of one of the runs, which go one after another into one CUDA graph, for each of its replays."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for run in runs[:2]:  # what is compiled or allocated at first use
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for number in range(repetitions + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number >= 2:
            times.append(start.elapsed_time(end) / 1e3 / len(runs))
    return times


def cuda_seconds(runs: Sequence[Callable[[], object]]) -> float:
    return statistics.median(in_cuda_graph(runs))


def tune_on_gpu(
    chain: Chain, tensors: Mapping[str, Tensor | None], measure: Measure = cuda_seconds
) -> dict[str, Measured]:
    """`tune` with the current GPU's limits."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return tune(
        chain,
        tensors,
        measure,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY),
        cache_bytes=properties.L2_cache_size,
    )


# -- the grafts of a checkpoint --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TunedGraft:
    """What reads the memory of one kind of graft, measured at one size."""

    kind: str
    size: str
    launches: dict[str, Measured]
    """By `tuned.key`, which begins with the step's name."""


@dataclass(frozen=True)
class TunedCheckpoint:
    gpu: str
    file: Path
    """Where it is kept."""
    grafts: list[TunedGraft]


def tune_checkpoint(
    checkpoint: str | Path,
    *,
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = (1,),
    slots: Sequence[int] = (1024,),
    dtype: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> TunedCheckpoint:
    """Measure what reads the memory in a patched checkpoint, at every size, on the current GPU, and keep it. Only the
    config is read. `lengths`: tokens of a row, 1 where it decodes; `dtype`: "bfloat16", "float16" or "float32", by
    default the checkpoint's.

    Raises SurgeonError where there is no CUDA device, no Triton, or no graft, and CheckpointError.
    """
    if not torch.cuda.is_available():
        raise SurgeonError(
            f"torch {torch.__version__} finds no CUDA device: tile configs are measured on the GPU they are for"
        )
    if importlib.util.find_spec("triton") is None:
        raise SurgeonError("the kernels need Triton: pip install 'lvlm-surgeon[kernels]'")
    # these need Triton
    import triton

    from exporters.kernels import workload

    grafts = _grafts(checkpoint)
    dtype = dtype or name_of(grafts[0].weights()[0].dtype)
    gpu = torch.cuda.get_device_name()
    sizes = [workload.Size(b, n, m, dtype) for b in batches for n in lengths for m in slots]
    tuned_grafts: list[TunedGraft] = []
    for graft in grafts:
        for size in sizes:
            if progress is not None:
                progress(f"{graft.kind}: {size}", len(tuned_grafts), len(grafts) * len(sizes))
            chain, types = workload.attention_workload(graft, size)
            tuned_grafts.append(TunedGraft(graft.kind, str(size), tune_on_gpu(chain, workload.draw(types, "cuda"))))
            file = keep(gpu, triton.__version__, tuned_grafts[-1].launches)
    return TunedCheckpoint(gpu, file, tuned_grafts)


def _grafts(checkpoint: str | Path) -> list[Any]:
    """One of each kind and size, on the meta device."""
    from surgeon.checkpoint.reader import Checkpoint
    from surgeon.memory.graft import Graft
    from surgeon.models import read_model

    with Checkpoint.open(checkpoint, weights="optional") as opened:
        model = read_model(opened, torch.float32).model
    grafts: list[Any] = [module for module in model.modules() if isinstance(module, Graft)]
    if not grafts:
        raise SurgeonError(f"{checkpoint} has no memory layers: patch it first (surgeon passes)")
    return list({(graft.kind, *(weight.shape for weight in graft.weights())): graft for graft in grafts}.values())
