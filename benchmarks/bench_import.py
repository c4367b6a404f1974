"""Importing a checkpoint of InternVL2-8B's sizes (bf16, about 16 GB) from its published layout, against `cp`."""

import shutil
import time
from pathlib import Path
from typing import Any

from _measure import (
    MB,
    MIB,
    Jobs,
    Report,
    Spread,
    cp,
    interleaved,
    make_cold,
    parser,
    ratios,
    resident,
    run_job,
    serve,
    working_directory,
)

CHECKPOINT_BYTES = 17 * 10**9


def import_job(source: str, target: str) -> dict[str, Any]:
    """In a child: import, timed from after the imports."""
    import transformers

    from surgeon.importing import import_checkpoint

    assert transformers.InternVLForConditionalGeneration  # transformers imports a model's code when it is asked for
    after_imports = resident()
    start = time.perf_counter()
    import_checkpoint(source, target)
    return {"seconds": time.perf_counter() - start, "after_imports": after_imports}


def write_job(directory: str) -> dict[str, Any]:
    """In a child: write the checkpoint."""
    import _internvl2

    return _internvl2.write(directory)


JOBS: Jobs = {"import": import_job, "write": write_job}


def main() -> None:
    serve(JOBS)
    argument_parser = parser(__doc__, "import")
    argument_parser.add_argument(
        "--directory", type=Path, help="where to work, on the disk to be measured; emptied after"
    )
    argument_parser.add_argument("--repetitions", type=int, default=2)
    options = argument_parser.parse_args()
    report = Report("import", {"repetitions": options.repetitions})
    peaks: list[float] = []
    with working_directory(options.directory, 2 * CHECKPOINT_BYTES + 10**9) as work:
        run_job(__file__, "write", directory=str(work / "source"))
        shards = sorted((work / "source").glob("*.safetensors"))
        size = sum(path.stat().st_size for path in shards)
        report.figure("checkpoint", size / 1e9, f"GB in {len(shards)} shards")

        def imported() -> float:
            """MB/s of an import, its own fsync and all else it does included."""
            make_cold(shards)
            run = run_job(__file__, "import", source=str(work / "source"), target=str(work / "imported"))
            shutil.rmtree(work / "imported")
            peaks.append(run.peak_rss / MIB)
            report.figure("of the peak after imports", run.answer["after_imports"] / MIB, "MiB")
            seconds: float = run.answer["seconds"]
            return size / MB / seconds

        speeds = interleaved({"cp": lambda: cp(shards, work / "cp"), "import": imported}, options.repetitions)
    report.figure("cp and fsync", speeds["cp"], "MB/s")
    report.figure("import", speeds["import"], "MB/s")
    report.check("import / cp", ratios(speeds["import"], speeds["cp"]), ">=", 0.7, "x")
    report.check("peak memory", Spread(tuple(peaks)), "<=", 1536, "MiB")
    report.write(options.out)


if __name__ == "__main__":
    main()
