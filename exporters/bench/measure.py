"""Forms of a model, measured in turns: what disturbs the machine meets them all alike."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from exporters.onnxruntime.session import Provider
from surgeon.cleanup import add_cleanup_errors
from surgeon.errors import SurgeonError


@dataclass(frozen=True)
class Workload:
    """What each form is asked: `batch` times the prompt with its images, `steps` tokens each (2 at least), `rounds`
    times."""

    prompt: str
    images: tuple[Path, ...] = ()
    steps: int = 64
    batch: int = 1
    rounds: int = 3
    threads: int | None = None
    provider: Provider = "auto"
    """What ONNX Runtime computes bundles with."""


@dataclass(frozen=True)
class Measured:
    """One form. Times in seconds, medians over rounds; memory in bytes, the process at its peak."""

    path: str
    stage: str
    dtype: str
    device: str
    prompt_tokens: int
    load_seconds: float
    first_token: float
    """Images, prompt and the first token of every row."""
    step: float
    """Median of the steps after it."""
    step_p95: float
    tokens_per_second: tuple[float, ...]
    """Of all rows together, after the first token; one a round."""
    peak_memory: int
    device_memory: int

    @property
    def speed(self) -> float:
        return statistics.median(self.tokens_per_second)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"speed": self.speed}


def measure(
    paths: Sequence[str | Path], workload: Workload, progress: Callable[[str, int, int], None] | None = None
) -> list[Measured]:
    """Measure checkpoints and bundles; all are loaded at the same time, each in a process of its own.

    Raises SurgeonError for one that cannot be run, with its process's last words.
    """
    with ExitStack() as stack:
        children = [stack.enter_context(_Child(Path(path), workload)) for path in paths]
        total = len(children) * (workload.rounds + 1)
        for done, child in enumerate(children):
            child.wait_until_ready()
            if progress:
                progress("loading", done + 1, len(children))
        for done in range(workload.rounds):
            for index, child in enumerate(children):
                child.round()
                if progress:
                    progress("measuring", done * len(children) + index + 1, total - len(children))
        return [child.finish() for child in children]


class _Child:
    """A process that measures one form."""

    def __init__(self, path: Path, workload: Workload) -> None:
        self.path, self.workload = path, workload
        self.about: dict[str, Any] = {}
        self.ends: list[list[float]] = []

    def __enter__(self) -> "_Child":
        request = asdict(self.workload) | {
            "path": str(self.path),
            "images": [str(image) for image in self.workload.images],
        }
        self.words = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "exporters.bench.child", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            text=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        streams = [stream for stream in (self.process.stdin, self.process.stdout, self.words) if stream is not None]
        ends: list[Callable[[], object]] = [self.process.kill, self.process.wait, *(stream.close for stream in streams)]
        for end in ends:
            if error is None:
                end()
            else:  # closing what a dead child no longer reads fails, and is not why it died
                add_cleanup_errors(error, end, "end the child")

    def wait_until_ready(self) -> None:
        self.about = self._hear()["ready"]

    def round(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.ends.append(self._hear()["ends"])

    def finish(self) -> Measured:
        assert self.process.stdin is not None
        self.process.stdin.close()
        memory = self._hear()
        self.process.wait()
        steps = [[b - a for a, b in pairwise(ends)] for ends in self.ends]
        ordered = sorted(step for run in steps for step in run)
        return Measured(
            path=str(self.path),
            **self.about,
            first_token=statistics.median(ends[0] for ends in self.ends),
            step=statistics.median(ordered),
            step_p95=ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            tokens_per_second=tuple(self.workload.batch * len(run) / sum(run) for run in steps),
            **memory,
        )

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.words.seek(0)
            last = self.words.read().decode(errors="replace").strip().splitlines()[-1:]
            how = "was killed, probably for the memory it took" if code == -9 else f"ended with {code}"
            raise SurgeonError(f"{self.path}: its process {how}" + (f": {last[0]}" if last else ""))
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise SurgeonError(message["error"])
        return message
