"""A child that crashes, is killed or says why it stops becomes one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from exporters.child_process import ProcessError, log_errors, log_tail, run_child


def child(folder: Path, code: str) -> Path:
    script = folder / "script.py"
    script.write_text("import os, sys, json, signal, time\n" + code)
    return script


def test_events_come_as_they_are_told(tmp_path: Path) -> None:
    script = child(tmp_path, "for i in range(3): print(json.dumps({'event': 'step', 'i': i, 'argument': sys.argv[1]}))")
    heard: list[int] = []
    outcome = run_child(["x"], "it", tmp_path / "log", script, None, lambda event: heard.append(event["i"]))
    assert heard == [0, 1, 2]
    assert outcome.last("step") == {"event": "step", "i": 2, "argument": "x"} and outcome.last("other") is None
    assert outcome.peak_memory > 1 << 20


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("os.abort()", r"building ended by SIGABRT; the last it said: second \| third \| fourth$"),
        ("sys.exit(7)", r"ended with exit code 7; the last it said: second"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            r"out of memory: building was killed with \d+\.\d GiB in use, this machine",
        ),
        ("print('std::bad_alloc', file=sys.stderr, flush=True); os.abort()", "out of memory: building was killed"),
    ],
    ids=["abort", "exit", "killed", "bad_alloc"],
)
def test_a_death_is_explained(tmp_path: Path, code: str, expected: str) -> None:
    printing = "print('first\\nsecond\\n\\nthird\\nfourth', file=sys.stderr, flush=True)\n"
    with pytest.raises(ProcessError, match=expected) as raised:
        run_child([], "building", tmp_path / "log", child(tmp_path, printing + code))
    assert "\n" not in str(raised.value) and raised.value.exit_code == 3


def test_a_child_that_says_why_it_stops_is_no_crash(tmp_path: Path) -> None:
    script = child(tmp_path, "print(json.dumps({'event': 'failed', 'stage': 'parse'})); sys.exit(1)")
    failed = run_child([], "it", tmp_path / "log", script).last("failed")
    assert failed is not None and failed["stage"] == "parse"


def test_an_interrupted_parent_leaves_no_child(tmp_path: Path) -> None:
    script = child(tmp_path, "print(json.dumps({'event': 'pid', 'pid': os.getpid()}), flush=True); time.sleep(600)")
    pids: list[int] = []

    def interrupt(event: dict[str, int]) -> None:
        pids.append(event["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child([], "it", tmp_path / "log", script, None, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_child_whose_parent_is_gone_ends_at_its_next_step(tmp_path: Path) -> None:
    """The events have nowhere to go, so the library is asked to stop."""
    code = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from exporters.tensorrt.child import Build, MappedWeights
class Monitor: pass
class Library: IProgressMonitor = Monitor
def emit(event, **content): raise BrokenPipeError
monitor = Build.__new__(Build)
monitor.trt, monitor.emit, monitor.unused = Library, emit, []
monitor.weights = MappedWeights(pathlib.Path("weights"))
made = monitor._monitor()
made.phase_start("building", None, 3)
sys.exit(made.step_complete("building", 0))
"""
    root = str(Path(__file__).resolve().parents[2])
    assert subprocess.run([sys.executable, "-c", code, root], check=False).returncode == 0


def test_the_log_tail_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a\nb\n\n  c  \n" + b"d" * 1000 + b"\xff\n")
    tail = log_tail(tmp_path / "log")
    assert tail.startswith("b | c | ddd") and len(tail) < 400 and "\n" not in tail


def test_errors_are_told_before_what_came_after_them(tmp_path: Path) -> None:
    log = tmp_path / "log"
    noise = "[ERROR] [checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime"
    log.write_text(f"[INFO] a\n[ERROR] no kernel\n{noise}\n[INFO] b\n[INFO] c\n[INFO] d\n")
    assert log_errors(log) == "[ERROR] no kernel"
    log.write_text(f"[INFO] a\n{noise}\n")
    assert log_errors(log) == noise
    log.write_text("[INFO] a\n")
    assert log_errors(log) == "[INFO] a"


def test_a_child_that_cannot_be_ended_does_not_hide_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = child(tmp_path, "print(json.dumps({'event': 'on'}), flush=True)")

    def refuse(process: subprocess.Popen[bytes]) -> None:
        raise PermissionError("not yours")

    def broken(event: object) -> None:
        raise ZeroDivisionError("the first")

    monkeypatch.setattr(subprocess.Popen, "kill", refuse)
    with pytest.raises(ZeroDivisionError, match="the first") as raised:
        run_child([], "it", tmp_path / "log", script, on_event=broken)
    assert "not yours" in raised.value.__notes__[0]
