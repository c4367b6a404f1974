"""Patching a checkpoint with Qwen3-VL-8B's tensors (bf16, about 17 GB): weights linked, and copied against `cp`."""

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _measure import (
    MB,
    MIB,
    Finished,
    Jobs,
    Report,
    Spread,
    cp,
    disk_bytes,
    files,
    interleaved,
    make_cold,
    parser,
    ratios,
    resident,
    run_job,
    serve,
    working_directory,
)

PVM = "pvm:layers=8,16,24,latent=512"
CHECKPOINT_BYTES = 18 * 10**9


def patch_job(source: str, target: str, weights: str) -> dict[str, Any]:
    """In a child: patch, timed from after the imports."""
    import transformers

    import passes
    from surgeon.checkpoint import Checkpoint
    from surgeon.patch import patch
    from surgeon.recipe import Recipe

    assert transformers.Qwen3VLForConditionalGeneration  # transformers imports a model's code when it is asked for
    after_imports = resident()
    start, cpu = time.perf_counter(), time.process_time()
    graft_passes = Recipe.from_arguments([PVM], 0).make_passes(passes.registry())
    report = patch(source, target, graft_passes, weights=weights)  # type: ignore[arg-type]
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    with Checkpoint.open(source) as checkpoint:
        small = sum(path.stat().st_size for path in checkpoint.side_files)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "bytes_written": report.bytes_written,
        "new_tensors": report.new_parameters * 2,
        "small_files": small,
        "after_imports": after_imports,
        "methods": sorted(set(report.shared.values())),
    }


def write_job(directory: str) -> dict[str, Any]:
    """In a child: write the checkpoint."""
    import _synthetic

    return _synthetic.write_8b(directory)


JOBS: Jobs = {"patch": patch_job, "write": write_job}


def measure_link(source: Path, work: Path, repetitions: int, report: Report) -> None:
    runs: list[Finished] = []
    for _ in range(repetitions):
        target = work / "linked"
        runs.append(run_job(__file__, "patch", source=str(source), target=str(target), weights="link"))
        on_disk = disk_bytes(list(files(target)))
        shutil.rmtree(target)
    last = runs[-1].answer
    report.figure("link: how the weights were shared", ", ".join(last["methods"]))  # type: ignore[arg-type]
    report.check("link: time", Spread(tuple(run.answer["seconds"] for run in runs)), "<=", 3, "s")
    cpu = Spread(tuple(run.answer["cpu_seconds"] for run in runs))
    report.figure("link: processor time in it, all threads", cpu, "s")
    report.check("link: peak memory", Spread(tuple(run.peak_rss / MIB for run in runs)), "<=", 700, "MiB")
    report.figure("link: of it after imports", last["after_imports"] / MIB, "MiB")
    needed = last["new_tensors"] + last["small_files"]
    report.figure("link: new tensors and the source's small files", needed / MB, "MB")
    report.check("link: written beyond those", (last["bytes_written"] - needed) / MB, "<=", 1, "MB")
    if "reflink" not in last["methods"]:  # whose blocks would be counted twice
        report.check("link: on the disk beyond those", (on_disk - needed) / MB, "<=", 1, "MB")


def measure_copy(source: Path, work: Path, repetitions: int, report: Report) -> None:
    shards = sorted(source.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in shards)
    peaks: list[float] = []

    def patch() -> float:
        """MB/s of a patch with copied weights, its own fsync and all else it does included, of the same shards."""
        target = work / "copied"
        make_cold(shards)
        run = run_job(__file__, "patch", source=str(source), target=str(target), weights="copy")
        shutil.rmtree(target)
        peaks.append(run.peak_rss / MIB)
        seconds: float = run.answer["seconds"]
        return size / MB / seconds

    speeds = interleaved({"cp": lambda: cp(shards, work / "cp"), "patch": patch}, repetitions)
    report.figure("copy: cp and fsync", speeds["cp"], "MB/s")
    report.figure("copy: patch", speeds["patch"], "MB/s")
    report.check("copy: patch / cp", ratios(speeds["patch"], speeds["cp"]), ">=", 0.9, "x")
    report.check("copy: peak memory", Spread(tuple(peaks)), "<=", 700, "MiB")


def main() -> None:
    serve(JOBS)
    argument_parser = parser(__doc__, "patch")
    argument_parser.add_argument(
        "--directory", type=Path, help="where to work, on the disk to be measured; emptied after"
    )
    argument_parser.add_argument(
        "--checkpoint", type=Path, help="use this checkpoint, which is kept, instead of writing one"
    )
    argument_parser.add_argument("--repetitions", type=int, default=3, help="of the patches with linked weights")
    argument_parser.add_argument("--copies", type=int, default=2, help="repetitions of the copies; 0: none")
    options = argument_parser.parse_args()
    report = Report("patch", {"repetitions": options.repetitions, "copies": options.copies, "recipe": PVM})
    count = (options.checkpoint is None) + (options.copies > 0)
    with ExitStack() as stack:
        # a checkpoint can be linked to only from its own file system
        parent = options.checkpoint.parent if options.checkpoint else options.directory
        work = stack.enter_context(working_directory(parent, count * CHECKPOINT_BYTES + 10**9))
        source = options.checkpoint or work / "source"
        if options.checkpoint is None:
            run_job(__file__, "write", directory=str(source))
        shards = sorted(source.glob("*.safetensors"))
        report.figure("checkpoint", sum(path.stat().st_size for path in shards) / 1e9, f"GB in {len(shards)} shards")
        measure_link(source, work, options.repetitions, report)
        if options.copies:
            measure_copy(source, work, options.copies, report)
    report.write(options.out)


if __name__ == "__main__":
    main()
