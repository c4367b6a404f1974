"""What the benchmarks share: child processes and their peak memory, medians with their spread, the machine, reports.

The work that is measured for memory runs in a child, whose peak is what the kernel counted for it. The parent stays
small (no torch), because a child starts as a copy of its parent and would inherit the parent's size as its peak.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[1]
MB, MIB = 10**6, 2**20
_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu")
_JOB = "--job"
Jobs = Mapping[str, Callable[..., dict[str, Any]]]


@dataclass(frozen=True)
class Finished:
    """A child that ended well."""

    answer: dict[str, Any]
    """What its job returned."""
    peak_rss: int
    """Bytes resident at its peak, imports and mapped files included."""


def serve(jobs: Jobs) -> None:
    """In a child of `run_job`: do the job and exit. Call it first thing in `main`; in the parent it does nothing."""
    if sys.argv[1:2] == [_JOB]:
        name, arguments = json.loads(sys.argv[2])
        answer = jobs[name](**arguments)
        print("\n" + json.dumps(answer), flush=True)
        sys.exit(0)


def run_job(script: str, name: str, **arguments: Any) -> Finished:
    """Run one of the jobs that `script` serves in a child process. Raises RuntimeError where it fails."""
    command = [sys.executable, script, _JOB, json.dumps([name, arguments])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdout=output, env=environment)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode()
    if child.returncode:
        raise RuntimeError(f"the job {name} failed with {child.returncode}:\n{text}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(json.loads(text.strip().splitlines()[-1]), usage.ru_maxrss * unit)


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({min(self.values):.4g} to {max(self.values):.4g})"

    def as_dict(self) -> dict[str, Any]:
        return {
            "median": _rounded(self.median),
            "min": _rounded(min(self.values)),
            "max": _rounded(max(self.values)),
            "repetitions": len(self.values),
        }


def interleaved(tasks: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, Spread]:
    """Measure every task once, then every one again, ...: what disturbs the machine meets them all alike."""
    measurements: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repetitions):
        for name, task in tasks.items():
            measurements[name].append(task())
    return {name: Spread(tuple(values)) for name, values in measurements.items()}


def ratios(above: Spread, below: Spread) -> Spread:
    """The ratio of two things measured interleaved, repetition by repetition."""
    return Spread(tuple(a / b for a, b in zip(above.values, below.values, strict=True)))


def files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink())


def disk_bytes(paths: Sequence[Path]) -> int:
    """What files occupy on the disk, not counting those that are hard links to others."""
    return sum(stat.st_blocks * 512 for stat in map(os.stat, paths) if stat.st_nlink == 1)


def resident() -> int:
    """Bytes resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_cold(paths: Sequence[Path]) -> None:
    """Drop files from the page cache, so that they are read from the disk."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cp(paths: Sequence[Path], target: Path) -> float:
    """MB/s of `cp` of cold files to the directory `target`, which is created and removed, and fsync of the copies."""
    target.mkdir()
    make_cold(paths)
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *map(str, paths), str(target)], check=True)
    subprocess.run(["sync", *(str(target / path.name) for path in paths)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return sum(path.stat().st_size for path in paths) / MB / seconds


def machine() -> dict[str, Any]:
    """Processor, memory and versions; no date, and the load to tell a disturbed run from a quiet one."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.system(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": versions,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """A parser with `--out`."""
    argument_parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    argument_parser.add_argument(
        "--out", type=Path, default=RESULTS / f"{name}.json", help="where the figures are written"
    )
    return argument_parser


class Report:
    """Figures against their targets, printed as they come and written at the end."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.content: dict[str, Any] = {"benchmark": name, "settings": dict(settings), "machine": machine()}
        self.content |= {"checks": [], "figures": {}}
        print(f"{name}: {self.content['machine']['cpu']}, {self.content['machine']['cores']} cores")

    def figure(self, name: str, value: Spread | float | int | dict[str, Any], unit: str = "") -> None:
        text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else f"{value}"
        print(f"  {name}: {text} {unit}".rstrip(), flush=True)
        plain = value.as_dict() if isinstance(value, Spread) else _rounded(value)
        self.content["figures"][name] = {"value": plain, "unit": unit} if unit else plain

    def check(self, name: str, value: Spread | float | int, relation: str, target: float, unit: str = "") -> None:
        """A figure that has a target: relation is "<=" or ">=". For repetitions the median is what counts."""
        single = value.median if isinstance(value, Spread) else value
        met = single <= target if relation == "<=" else single >= target
        text = str(value) if isinstance(value, Spread) else f"{value:,.4g}"
        print(f"  {'met   ' if met else 'MISSED'} {name}: {text} {unit} (target {relation} {target:,g})", flush=True)
        plain = value.as_dict() if isinstance(value, Spread) else _rounded(value)
        self.content["checks"].append(
            {"name": name, "value": plain, "unit": unit, "target": f"{relation} {target:g}", "met": bool(met)}
        )

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


@contextmanager
def working_directory(parent: Path | None, needed: int) -> Iterator[Path]:
    """A directory that is deleted at the end, also after a failure; refused where the disk has not `needed` bytes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which cleans up; the signal alone would not
    with tempfile.TemporaryDirectory(prefix="surgeon-benchmark-", dir=parent) as name:
        free = shutil.disk_usage(name).free
        if free < needed:
            raise SystemExit(
                f"{parent or name}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free; use --directory"
            )
        yield Path(name)
