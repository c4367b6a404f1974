"""Building the decoder engine of a synthetic 2B bf16 bundle on the CPU, and planning the engines of an 8B one.

The 2B model has Qwen3-VL-2B's text sizes, a small vision tower and PVM on 3 layers. Every weight is a random number of
its own: TensorRT for RTX stores weights that repeat once. Only the decoder's engine is built, in the child process that
`surgeon engine` builds in; its peak is what the kernel counted for it. How much of that is memory of its own, and how
much pages of files that are mapped (the weights among them, which the kernel takes back where memory is short), is
sampled from /proc while it runs. It is built for a range of batch sizes, the command's default, and for one row alone:
with a single row decoding has a static shape, for which the library lays weights out otherwise than for prefill.

The 8B model has Qwen3-VL-8B's tensors with PVM on 3 layers. Its files are sparse, headers with a hole behind them: a
plan must not read weights, so there need not be any.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _measure import MIB, ROOT, Jobs, Report, Spread, parser, run_job, serve, working_directory

TEXT_2B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
PVM_2B, PVM_8B = "pvm:layers=7,14,21,latent=512", "pvm:layers=8,16,24,latent=512"
TARGET, PREFILL = "sm89", "1..4096"
BATCHES = ("1..8", "1")
MAX_LENGTH = 4096
GB = 10**9
NEEDED = 14 * GB
_EVERY = 0.05


# -- in children -----------------------------------------------------------------------------------------------------
def lay_out(directory: Path, config: Any) -> Path:
    """A checkpoint of bf16 tensors whose file is a header and a hole; -> that file."""
    import _synthetic
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    entries: dict[str, Any] = {}
    end = 0
    for name, value in model.state_dict().items():
        start, end = end, end + value.nbytes
        entries[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % 64)
    directory.mkdir(parents=True)
    path = directory / "model.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    for side in _synthetic._SIDE_FILES:
        shutil.copyfile(_synthetic.DEMO / side, directory / side)
    return path


def write_2b_job(directory: str) -> dict[str, Any]:
    """Write the 2B checkpoint, every weight drawn for itself."""
    import _synthetic
    import torch

    from surgeon.checkpoint import read_header

    path = lay_out(Path(directory), _synthetic.config_small(**TEXT_2B))
    generator = torch.Generator().manual_seed(0)
    with open(path, "r+b") as file:
        for info in read_header(path).values():
            weight = (torch.randn(info.shape, generator=generator) * 0.02 + (len(info.shape) == 1)).to(torch.bfloat16)
            file.seek(info.offset)
            file.write(weight.view(torch.int16).numpy().data)
    return {"bytes": path.stat().st_size}


def lay_out_8b_job(directory: str) -> dict[str, Any]:
    """Write the 8B checkpoint without its weights."""
    import _synthetic

    return {"bytes": lay_out(Path(directory), _synthetic.config_8b()).stat().st_size}


def bundle_job(source: str, patched: str, bundle: str, recipe: str, graphs: list[str] | None) -> dict[str, Any]:
    """Graft, and export in bf16."""
    import passes
    from exporters.export import export_bundle
    from surgeon.dtypes import PRECISIONS
    from surgeon.patch import patch
    from surgeon.recipe import Recipe

    patch(source, Path(patched), Recipe.from_arguments([recipe], 0).make_passes(passes.registry()), weights="link")
    export_bundle(patched, Path(bundle), dtype=PRECISIONS["bf16"], max_length=MAX_LENGTH, graphs=graphs)
    return {}


@dataclass
class MemoryReads:
    """Of a process, in bytes, as /proc tells it."""

    total: int = 0
    anonymous: int = 0
    """Its own: no one else has it, and without swap it stays."""
    files: int = 0
    """Pages of mapped files: weights and libraries."""


class ChildMemory(threading.Thread):
    """Samples the process that this one started, while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.at_peak, self.anonymous, self.samples = MemoryReads(), 0, 0
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(_EVERY):
            for task in Path("/proc/self/task").iterdir():
                for pid in _read(task / "children").split():
                    self._take(_read(Path("/proc", pid, "status")))

    def stop(self) -> None:
        self._end.set()
        self.join()

    def _take(self, status: str) -> None:
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "RssAnon" not in lines:  # it has ended
            return
        total, anonymous, shared, files = (
            int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon", "RssShmem", "RssFile")
        )
        self.samples += 1
        self.anonymous = max(self.anonymous, anonymous + shared)
        if total > self.at_peak.total:
            self.at_peak = MemoryReads(total, anonymous + shared, files)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process is gone
        return ""


def build_job(bundle: str, target: str, batch: str) -> dict[str, Any]:
    """Build the decoder's engine."""
    from exporters.tensorrt.build import Options, build_engines
    from exporters.tensorrt.library import find
    from exporters.tensorrt.plan import make_plan
    from exporters.tensorrt.profiles import Limits

    limits = Limits.parse(PREFILL, batch, None, None)
    options = Options(target=TARGET, dtype="bf16", limits=limits, graphs=("decoder",))
    (plan,) = make_plan(Path(bundle), options.backend, limits, options.dtype, options.graphs).graphs
    library = find(options.backend)  # before the sampling: it asks a child, too
    memory = ChildMemory()
    memory.start()
    start = time.perf_counter()
    built = build_engines(Path(bundle), Path(target), options)
    seconds = time.perf_counter() - start
    memory.stop()
    decoder = built.report.graphs["decoder"]
    return {
        "library": f"{library.backend} {library.version}",
        "seconds": seconds,
        "child_seconds": built.seconds["decoder"],
        "weights": plan.weight_bytes,
        "engine": built.manifest.engines["decoder"].bytes,
        "peak": built.peak_memory["decoder"],
        "own_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "at_peak": asdict(memory.at_peak),
        "anonymous": memory.anonymous,
        "samples": memory.samples,
        "attention": decoder.count("Attention"),
    }


JOBS: Jobs = {
    "write_2b": write_2b_job,
    "lay_out_8b": lay_out_8b_job,
    "bundle": bundle_job,
    "build": build_job,
}


# -- measured --------------------------------------------------------------------------------------------------------
def measure_build(work: Path, repetitions: int, report: Report) -> None:
    bundle = work / "2b-bundle"
    run_job(__file__, "write_2b", directory=str(work / "2b"))
    run_job(
        __file__,
        "bundle",
        source=str(work / "2b"),
        patched=str(work / "2b-patched"),
        bundle=str(bundle),
        recipe=PVM_2B,
        graphs=["decoder"],
    )
    runs: dict[str, list[dict[str, Any]]] = {batch: [] for batch in BATCHES}
    for _ in range(repetitions):
        for batch, answers in runs.items():
            job = {"bundle": str(bundle), "target": str(work / "engines"), "batch": batch}
            answers.append(run_job(__file__, "build", **job).answer)
            shutil.rmtree(work / "engines")
    first = runs[BATCHES[0]][0]
    report.figure("2B decoder: library", first["library"])
    report.figure("2B decoder: weights", first["weights"] / GB, "GB")
    for batch, answers in runs.items():
        report_build(f"2B decoder, batch {batch}", answers, report)


def report_build(label: str, answers: list[dict[str, Any]], report: Report) -> None:
    weights = answers[0]["weights"]

    def of_weights(sizes: list[int]) -> Spread:
        return Spread(tuple(size / weights for size in sizes))

    report.figure(f"{label}: build", Spread(tuple(a["seconds"] for a in answers)), "s")
    report.figure(f"{label}: of it in the child", Spread(tuple(a["child_seconds"] for a in answers)), "s")
    fused, attentions = answers[0]["attention"]
    report.figure(f"{label}: attentions that are one kernel", {"fused": fused, "of": attentions})
    report.check(f"{label}: peak memory of the child / weights", of_weights([a["peak"] for a in answers]), "<=", 2.5)
    at_peak = [a["at_peak"] for a in answers]
    report.figure(f"{label}: at that time, its own memory / weights", of_weights([m["anonymous"] for m in at_peak]))
    report.figure(f"{label}: at that time, pages of files / weights", of_weights([m["files"] for m in at_peak]))
    report.figure(f"{label}: most memory of its own / weights", of_weights([a["anonymous"] for a in answers]))
    report.figure(f"{label}: peak memory of surgeon itself", max(a["own_peak"] for a in answers) / MIB, "MiB")
    report.check(f"{label}: engine / weights", of_weights([a["engine"] for a in answers]), "<=", 2.5)


def measure_plan(work: Path, repetitions: int, report: Report) -> None:
    bundle = work / "8b-bundle"
    size = run_job(__file__, "lay_out_8b", directory=str(work / "8b")).answer["bytes"]
    run_job(
        __file__,
        "bundle",
        source=str(work / "8b"),
        patched=str(work / "8b-patched"),
        bundle=str(bundle),
        recipe=PVM_8B,
        graphs=None,
    )
    report.figure("8B checkpoint", size / GB, "GB")
    times, peaks = [], []
    for _ in range(repetitions):
        seconds, peak = plan(bundle)
        times.append(seconds)
        peaks.append(peak / MIB)
    report.check("8B, --dry-run: time of the process", Spread(tuple(times)), "<=", 5, "s")
    report.figure("8B, --dry-run: peak memory", Spread(tuple(peaks)), "MiB")


def plan(bundle: Path) -> tuple[float, int]:
    """`surgeon engine --dry-run` as a user runs it: seconds, and bytes resident at its peak."""
    command = [sys.executable, "-m", "cli", "engine", str(bundle), "--target", TARGET, "--prefill", PREFILL]
    start = time.perf_counter()
    child = subprocess.Popen([*command, "--batch", "1..8", "--dry-run"], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"surgeon engine --dry-run ended with {child.returncode}")
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    serve(JOBS)
    argument_parser = parser(__doc__.split("\n\n")[0] if __doc__ else "", "engine")
    argument_parser.add_argument("--directory", type=Path, help="where to work; emptied after")
    argument_parser.add_argument("--repetitions", type=int, default=2, help="of the build")
    argument_parser.add_argument("--plans", type=int, default=5, help="repetitions of the dry run")
    options = argument_parser.parse_args()
    settings = {"text": TEXT_2B, "recipes": [PVM_2B, PVM_8B], "target": TARGET, "prefill": PREFILL, "batches": BATCHES}
    report = Report("engine", settings | {"repetitions": options.repetitions, "plans": options.plans})
    with ExitStack() as stack:
        work = stack.enter_context(working_directory(options.directory, NEEDED))
        measure_plan(work, options.plans, report)
        measure_build(work, options.repetitions, report)
    report.write(options.out)


if __name__ == "__main__":
    main()
