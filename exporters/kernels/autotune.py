"""Launches measured on the GPU that is here: `python -m exporters.kernels.autotune CHECKPOINT`, for the grafts of a
patched checkpoint. What is found is kept by `tuned`."""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from exporters.kernels.candidates import LEAST_SHARED_MEMORY, candidates
from exporters.kernels.kernel import Blocks, Chain, Step
from exporters.kernels.plan import ChooseBlocks, element_size, fixed_blocks
from exporters.kernels.tuned import Measured, keep, key
from surgeon.errors import SurgeonError

Measure = Callable[[Sequence[Callable[[], object]]], float]
"""Runs that do the same on tensors of their own -> seconds of one."""


def tune(
    chain: Chain,
    given: Mapping[str, Tensor | None],
    measure: Measure,
    *,
    shared_memory: int = LEAST_SHARED_MEMORY,
    cache_bytes: int = 0,
    offer: Callable[..., list[Blocks]] = candidates,
) -> dict[str, Measured]:
    """Measure every launch of a chain on these tensors -> the best of each, by `key`. `offer`: what gives the ways of
    cutting a launch, the rule's first, as `candidates` does.

    Each candidate runs on as many copies of its inputs as take three times `cache_bytes`: while a model decodes, a
    weight has left the GPU's cache before it is read again.
    """
    from exporters.kernels.launch import launch, type_of

    values = {name: tensor for name, tensor in given.items() if tensor is not None}
    found: dict[str, Measured] = {}
    chosen: dict[str, Blocks] = {}
    for number, step in enumerate(chain.steps):
        inputs = {name: values[value] for name, value in step.inputs.items() if value in values}
        types = {name: type_of(tensor) for name, tensor in inputs.items()}
        shapes = {name: tensor.shape for name, tensor in types.items()}
        choices = offer(step, shapes, element_size(types), shared_memory)
        hands_on = {tuple(step.kernel.outputs(shapes, step.options, each).items()) for each in choices}
        steps = chain.steps[number:] if len(hands_on) > 1 else (step,)
        copies = copies_of(steps, values, cache_bytes)
        times = {}
        for blocks in choices:
            fixed = fixed_blocks({**chosen, step.name: blocks})
            seconds = _try(measure, [partial(run_steps, steps, copy, fixed) for copy in copies])
            if seconds is not None:
                times[blocks] = seconds
        if choices[0] not in times:
            raise SurgeonError(f"{step.name}: the rule's own blocks {choices[0]} do not fit this GPU")
        best = min(times, key=lambda blocks: times[blocks])
        found[key(step, types)] = Measured(best, times[best], times[choices[0]], len(times))
        chosen[step.name] = best
        outputs = launch(step, inputs, fixed_blocks(chosen))
        values |= {value: outputs[name] for name, value in step.outputs.items()}
    return found


def run_steps(steps: Sequence[Step], given: Mapping[str, Tensor], choose: ChooseBlocks) -> None:
    """Launch some of a chain's steps. `given`: the values that they read and do not make."""
    from exporters.kernels.launch import launch

    values = dict(given)
    for tensor in values.values():
        if tensor.dtype == torch.int32:
            tensor.zero_()  # a counter that an earlier launch left at zero; the same cost for every candidate
    for step in steps:
        outputs = launch(step, {n: values[v] for n, v in step.inputs.items() if v in values}, choose)
        values |= {value: outputs[name] for name, value in step.outputs.items()}


def copies_of(steps: Sequence[Step], values: Mapping[str, Tensor], cache_bytes: int) -> list[dict[str, Tensor]]:
    """What the steps read and do not make, as often as takes three times `cache_bytes`: no cache holds it all."""
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
    chain: Chain, given: Mapping[str, Tensor | None], measure: Measure = cuda_seconds
) -> dict[str, Measured]:
    """`tune` with the current GPU's limits."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return tune(
        chain,
        given,
        measure,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY),
        cache_bytes=properties.L2_cache_size,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how the fused kernels' launches are best cut on this GPU.")
    parser.add_argument("checkpoint", help="a patched checkpoint; its config is read, its weights are not")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--length", type=int, nargs="+", default=[1], help="tokens of a row: 1 while decoding")
    parser.add_argument("--slots", type=int, nargs="+", default=[1024], help="visual tokens in the memory")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, f"torch {torch.__version__} finds no CUDA device: blocks are measured on the GPU they are for\n")
    import triton

    from exporters.kernels.workload import Size, draw, reading
    from surgeon.checkpoint.reader import Checkpoint
    from surgeon.memory.graft import Graft
    from surgeon.models import build_meta, read_config

    with Checkpoint.open(options.checkpoint) as checkpoint:
        model = build_meta(read_config(checkpoint.config))
    grafts = {module.kind: module for module in model.modules() if isinstance(module, Graft)}
    if not grafts:
        parser.exit(2, f"{options.checkpoint} has no grafts: patch it first\n")
    gpu = torch.cuda.get_device_name()
    for graft in grafts.values():
        for batch, length, slots in ((b, n, m) for b in options.batch for n in options.length for m in options.slots):
            size = Size(batch, length, slots, options.dtype)
            chain, types = reading(graft, size)
            found = tune_on_gpu(chain, draw(types, "cuda"))
            print(f"{graft.kind}: {size}")
            for name, each in found.items():
                by_rule_us, best_us = each.rule_seconds * 1e6, each.seconds * 1e6
                print(f"  {name.split()[0]}: {by_rule_us:.2f} us by rule, {best_us:.2f} us with {each.blocks}")
            path = keep(gpu, triton.__version__, found)
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
