"""What is installed, which backends work on this machine, and why the others do not.

Every check (`surgeon/probes.py`) runs in a process of its own: a broken library may do anything, end the process
included.
"""

import json
import platform
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon import leftovers
from surgeon.probes import BACKENDS, BEGUN, MARK, PACKAGES, installed_version

TIMEOUT = 120.0


@dataclass(frozen=True)
class Package:
    """`version` is None where it is not installed; `problem` says why it cannot be imported though it is."""

    name: str
    version: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Backend:
    """`detail`: on what it runs, or why it does not. `remedy`: what to install or do, where something helps."""

    name: str
    works: bool
    detail: str
    remedy: str | None = None


@dataclass(frozen=True)
class Storage:
    """What a directory's file system can do for shared weights; None where `problem` kept it from being tried."""

    directory: str
    free_bytes: int | None
    reflink: bool | None
    hardlink: bool | None
    problem: str | None = None

    @property
    def links(self) -> dict[str, bool | None]:
        return {"reflinks": self.reflink, "hard links": self.hardlink}


@dataclass(frozen=True)
class Leftover:
    """What lies in the directory of a run that was killed, or that is still at work (`use`: left, in use, unknown)."""

    path: str
    target: str
    use: leftovers.Use
    only_copy: bool
    """Whether nothing else is left of `target`."""

    @property
    def remedy(self) -> str:
        name = Path(self.target).name
        if self.use == "in use":
            return f"a run is writing {name}; leave it"
        if self.only_copy:
            return f"the only copy of {name}, which a killed run was replacing; rename it to {name}"
        if self.use == "unknown":
            return f"of a run that writes or wrote {name}; this file system does not tell which: delete it if none runs"
        return f"a killed run left it; the next run that writes {name} removes it, or delete it"


@dataclass(frozen=True)
class Diagnosis:
    packages: list[Package]
    backends: list[Backend]
    storage: Storage
    leftovers: list[Leftover] = field(default_factory=list)


def diagnose(directory: Path) -> Diagnosis:
    """Look at this Python, at every backend, at the file system of `directory`, and at what killed runs left in it.
    Raises nothing of what it finds."""
    with ThreadPoolExecutor(len(BACKENDS) + 2) as pool:
        imports = pool.submit(_run, "imports")
        storage = pool.submit(_storage, directory)
        backends = [pool.submit(_run, name) for name in BACKENDS]
        return Diagnosis(
            _packages(imports.result()),
            [_backend(name, outcome.result()) for name, outcome in zip(BACKENDS, backends, strict=True)],
            storage.result(),
            _leftovers(directory),
        )


@dataclass(frozen=True)
class _Outcome:
    """What a check printed. `died`: why its process ended before it was done."""

    results: dict[str, Any]
    died: str | None
    stderr: str


def _run(check: str, *arguments: str) -> _Outcome:
    """Run one check in a process of its own, which prints each result as one line of JSON."""
    # Not `-m`: that would put the working directory, and whatever modules lie there, in front of the libraries.
    code = "import sys; sys.path.append(sys.argv[1]); from surgeon.probes import run_check; run_check(*sys.argv[2:])"
    command = [sys.executable, "-P", "-c", code, str(Path(__file__).resolve().parents[1]), check, *arguments]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return _Outcome({}, f"gave no answer in {TIMEOUT:.0f} seconds", "")
    results: dict[str, Any] = {}
    for line in completed.stdout.splitlines():
        if line.startswith(MARK):
            results |= json.loads(line.removeprefix(MARK))
    return _Outcome(results, _cause_of_death(completed.returncode, completed.stderr), completed.stderr)


def _cause_of_death(code: int, stderr: str) -> str | None:
    if code == 0:
        return None
    cause = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    lines = stderr.strip().splitlines()
    return f"the process ended {cause}" + (f": {lines[-1].strip()[:300]}" if lines else "")


def _packages(imports: _Outcome) -> list[Package]:
    packages = [Package("python", platform.python_version())]
    for name, module in PACKAGES.items():
        version = installed_version(name)
        problem = imports.results.get(module, f"not tried: {imports.died}")
        if problem == BEGUN:
            problem = imports.died
        packages.append(Package(name, version, problem if version else None))
    return packages


def _backend(name: str, outcome: _Outcome) -> Backend:
    if "works" not in outcome.results:
        return Backend(name, False, outcome.died or "the check printed nothing")
    works, detail, remedy = (outcome.results.get(key) for key in ("works", "detail", "remedy"))
    # ONNX Runtime falls back to another provider in silence: only its log, on stderr, has the reason.
    reason = re.search(r"with error: (.*)|(CUDA failure .*?)(?: ;|$)|(Require cuDNN .*)", outcome.stderr, re.MULTILINE)
    if not works and reason is not None:
        detail = f"{detail}: {next(filter(None, reason.groups())).strip()[:300]}"
    return Backend(name, bool(works), str(detail), remedy)


def _storage(directory: Path) -> Storage:
    place = str(directory.resolve())
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Storage(place, None, None, None, f"{place}: {error.strerror or error}")
    outcome = _run("storage", place)
    problem = outcome.results.get("problem") or outcome.died
    return Storage(place, free, outcome.results.get("reflink"), outcome.results.get("hardlink"), problem)


def _leftovers(directory: Path) -> list[Leftover]:
    try:
        entries = leftovers.find(directory.resolve())
    except OSError:  # which the storage check says
        return []
    return [Leftover(str(each.path), str(each.target), leftovers.use(each), each.only_copy) for each in entries]
