"""Time on a GPU, and the two ceilings that everything is held against; in a rehearsal, everything run once."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from benchmarks._measure import Spread
from benchmarks.gpu_check.part import Setting
from exporters.kernels.autotune import in_cuda_graph
from exporters.kernels.tuned import read, slug

Run = Callable[[], object]


class Timer(ABC):
    l2_bytes: int
    """What a cache of the device can hold."""

    @abstractmethod
    def runs(self, runs: Sequence[Run], repetitions: int = 15) -> Spread:
        """Seconds of one of several runs that go one after another into one CUDA graph."""

    @abstractmethod
    def captured(self, run: Run) -> Run:
        """What `run` launches, as one CUDA graph."""

    @abstractmethod
    def per_call(self, run: Run, count: int) -> float:
        """Seconds of one call, of `count` in a row."""

    def now(self) -> float:
        """Seconds on the host's clock, when all that was started has ended."""
        return time.perf_counter()

    def wall(self, run: Run) -> float:
        """Seconds until all that a call started has ended."""
        start = self.now()
        run()
        return self.now() - start


class CudaTimer(Timer):
    def __init__(self) -> None:
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def runs(self, runs: Sequence[Run], repetitions: int = 15) -> Spread:
        return Spread(tuple(in_cuda_graph(runs, repetitions)))

    def captured(self, run: Run) -> Run:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def per_call(self, run: Run, count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        run()
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    def now(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()


class RehearsalTimer(Timer):
    """Runs what would be timed, once. What it returns is no measurement of anything."""

    l2_bytes = 1000

    def runs(self, runs: Sequence[Run], repetitions: int = 15) -> Spread:
        return Spread((self.wall(runs[0]),) * repetitions)

    def captured(self, run: Run) -> Run:
        return run

    def per_call(self, run: Run, count: int) -> float:
        return self.wall(run)


@triton.jit
def empty_kernel(x_ptr):  # type: ignore[no-untyped-def]
    pass


def timer(setting: Setting) -> Timer:
    return RehearsalTimer() if setting.dry else CudaTimer()


def describe_gpu(setting: Setting) -> dict[str, Any]:
    if setting.dry:
        return {"name": "none", "slug": "rehearsal"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "slug": slug(properties.name),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "launches_with_tuned_blocks": len(read(properties.name)),
    }


def measure_ceilings(clock: Timer, setting: Setting) -> dict[str, float]:
    """Bandwidth of a copy inside the device's memory, bytes read and written; and what each launch in a CUDA graph
    costs that does nothing."""
    size = setting.pick(2 << 30, 1 << 10)
    source = torch.randn(size // 4, device=setting.device)
    target = torch.empty_like(source)
    copy = min(clock.runs([lambda: target.copy_(source)] * 2).median, clock.per_call(lambda: target.copy_(source), 10))
    launches = clock.runs([lambda: empty_kernel[(1,)](target)] * setting.pick(500, 2))
    return {"copy, GB/s": 2 * source.nbytes / copy / 1e9, "empty launch, us": launches.median * 1e6}
