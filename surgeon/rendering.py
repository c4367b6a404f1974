"""Chat templates, rendered in a process of their own: a template is a program from outside, which may never end, or
all memory, and nothing inside a process can hold it back from both."""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from surgeon.errors import InputError, SurgeonError

SECONDS = 10.0
"""Time limit for one conversation. Typical ones take milliseconds."""
MEMORY = 1 << 30
"""Bytes that the process may allocate on top of its own size."""
_CHILD = Path(__file__).with_name("rendering_child.py")
_REMEDY = "copy chat_template.jinja from the model's source"


class RenderingError(SurgeonError):
    """The process that renders chat templates does not work here."""

    exit_code = 3


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> str:
    """What transformers renders of a conversation. `variables`: what the template sees beside `messages`. Any thread
    may call it. The process starts with the first call, in about a second, and ends with this one.

    Raises InputError where the template raises, or takes longer than `seconds` or more than `memory` bytes.
    """
    request = {
        "template": template,
        "messages": messages,
        "variables": variables,
        "seconds": seconds,
        "memory": memory,
    }
    # transformers shows templates what is not JSON by the name of its type
    line = json.dumps(request, default=lambda value: f"<{type(value).__name__}>")
    return _renderer(os.getpid()).render(line, seconds)


def start() -> None:
    """Begin to start the process, without waiting for it: `render` will be asked soon."""
    _renderer(os.getpid()).start()


@cache
def _renderer(process: int) -> "_Renderer":
    """Of this process: one that was forked shares no pipe with its parent."""
    return _Renderer()


class _Renderer:
    """The child process, started again where it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with self._lock:
            self._running()

    def render(self, request: str, seconds: float) -> str:
        with self._lock:
            child = self._running()
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.write(request + "\n")
                child.stdin.flush()
                answer = child.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # interrupted: its answer would be taken for that of the next request
                self._stop()
                raise
            if not answer:
                raise _ended(self._stop(), seconds)
        reply: dict[str, str] = json.loads(answer)
        if "broken" in reply:
            raise RenderingError(f"chat templates cannot be rendered: {reply['broken']}")
        if "failed" in reply:
            raise InputError(f"the chat template does not take this conversation: {reply['failed']}")
        return reply["text"]

    def _running(self) -> "subprocess.Popen[str]":
        if self._child is None or self._child.poll() is not None:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            # -P: the folder that the script is in holds modules of its own, which must not stand in for others
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                text=True,
                encoding="utf-8",
            )
            weakref.finalize(self, _end, self._child)
        return self._child

    def _stop(self) -> int:
        """-> the exit code of the child, as subprocess has it."""
        assert self._child is not None
        child, self._child = self._child, None
        return _end(child)


def _end(child: "subprocess.Popen[str]") -> int:
    code = child.poll()
    if code is None and child.stdout is not None and not child.stdout.closed:
        child.kill()
    code = child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what it was not there to read any more
                pipe.close()
    return code


def _ended(code: int, seconds: float) -> SurgeonError:
    """Of a child that did not answer."""
    if code == -signal.SIGALRM:
        return InputError(f"the chat template does not end within {seconds:g} s: {_REMEDY}")
    if code < 0:
        return InputError(f"the chat template ended its process by {signal.Signals(-code).name}: {_REMEDY}")
    return RenderingError(f"the process that renders chat templates ended with exit code {code}")
