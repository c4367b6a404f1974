"""Only in a rehearsal: both chains at their real sizes compiled ahead of time, as no interpreter compiles them."""

from benchmarks.gpu_check.grafts import real_grafts
from benchmarks.gpu_check.part import PartReport, Setting, Skipped
from benchmarks.gpu_check.timing import Timer
from exporters.kernels.aot import Job, compile_launches
from exporters.kernels.plan import plan
from exporters.kernels.workload import Size, attention_workload, memory_workload

CAPABILITIES = (90,)
SIZES = (Size(1, 1, 1024, mask_per_token=True), Size(1, 512, 1024, mask_per_token=True, visual_tokens=True))


def main(setting: Setting, clock: Timer, report: PartReport) -> None:
    if not setting.dry:
        raise Skipped("a rehearsal's part: here, kernels are compiled as they are launched")
    grafts = real_grafts()
    launches = []
    for name in ("PVM, Qwen3-VL-8B", "mixin, CoMemo-2B"):
        for size in SIZES:
            launches += plan(*attention_workload(grafts[name], size))
        launches += plan(*memory_workload(grafts[name], SIZES[0]))
    jobs = [Job(launch, capability) for launch in launches for capability in CAPABILITIES]
    kernels = compile_launches(jobs, fit=True)
    capabilities = " and ".join(map(str, CAPABILITIES))
    print(f"  {len(kernels)} launches compiled for compute capability {capabilities}; most shared memory "
          f"{max(kernel.shared for kernel in kernels) >> 10} KiB")  # fmt: skip
