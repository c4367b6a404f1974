"""A script in a process of its own, whose stdout is JSON, one event a line: started, listened to, its end explained."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.cleanup import add_cleanup_errors
from surgeon.errors import SurgeonError

_SHOWN_LINES = 3
_NO_MEMORY = ("bad_alloc", "out of memory", "outofmemory", "memoryerror", "cannot allocate memory")


class ProcessError(SurgeonError):
    """A process that was killed, or crashed, while it worked for us."""

    exit_code = 3


@dataclass(frozen=True)
class Outcome:
    """The events that a child reported, and its peak memory."""

    events: list[dict[str, Any]]
    peak_memory: int
    """Bytes that were resident at most."""

    def last(self, event: str) -> dict[str, Any] | None:
        return next((entry for entry in reversed(self.events) if entry["event"] == event), None)


def run_child(
    arguments: Sequence[str],
    task: str,
    log: Path,
    script: Path,
    library_path: Path | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    without: Sequence[str] = (),
) -> Outcome:
    """Run the file `script` to its end; `on_event` is called with each event as it comes. `task` says in messages
    what it was doing, `log` is the file that its stderr goes to, `library_path` a folder where it finds shared
    libraries, `without` variables that its environment shall not have.

    Raises ProcessError where the process was killed or crashed. A child that ends itself with an error has reported
    the reason in an event. When the caller is interrupted the child is killed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in without}
    if library_path is not None:
        paths = (str(library_path), environment.get("LD_LIBRARY_PATH", ""))
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    # -P: the folder that the script is in holds modules of its own, which must not stand in for others
    command = [sys.executable, "-P", str(script), *arguments]
    events = []
    with open(log, "wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment)
        assert process.stdout is not None
        try:
            with process.stdout as stdout:
                for line in stdout:
                    event = json.loads(line)
                    events.append(event)
                    if on_event is not None:
                        on_event(event)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException as error:
            for end in (process.kill, process.wait):
                add_cleanup_errors(error, end, f"end process {process.pid}")
            raise
    outcome = Outcome(events, usage.ru_maxrss * 1024)
    if process.returncode != 0 and outcome.last("failed") is None:
        raise ProcessError(_explain(task, process.returncode, usage, log))
    return outcome


def log_tail(log: Path, lines: int = _SHOWN_LINES) -> str:
    """The last lines of a log as one."""
    return " | ".join(_lines(log)[-lines:])


def log_errors(log: Path, lines: int = _SHOWN_LINES) -> str:
    """The first errors that the library logged, as one line; where it logged none, the last lines."""
    errors = [line for line in _lines(log) if line.startswith(("[ERROR]", "[INTERNAL_ERROR]"))]
    # without a driver every failure is followed by that of looking for one
    errors = [line for line in errors if "catchCudaError::" not in line] or errors
    return " | ".join(dict.fromkeys(errors[:lines])) or log_tail(log, lines)


def _lines(log: Path) -> list[str]:
    lines = (line.strip() for line in log.read_text(errors="replace").splitlines())
    return [line[:300] for line in lines if line]


def _explain(task: str, code: int, usage: resource.struct_rusage, log: Path) -> str:
    peak, total = usage.ru_maxrss * 1024, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tail = log_tail(log)
    if code == -signal.SIGKILL or any(sign in tail.lower() for sign in _NO_MEMORY):
        return (
            f"out of memory: {task} was killed with {peak / 2**30:.1f} GiB in use, this machine has "
            f"{total / 2**30:.1f} GiB; build on one with more, or a graph at a time (--graph)"
        )
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"{task} ended {how}; the last it said: {tail or 'nothing'}"
