"""The process in which chat templates are rendered; see `rendering.py`.

A script, run by its path. Each line of its stdin is a request, JSON, and is answered by a line on its stdout. It ends
with its stdin, and the system ends it where a template takes too long, whatever it is at.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent answers it
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except Exception as error:  # a broken installation; the parent reports it
        answers.write(json.dumps({"broken": _reason(error)}) + "\n")
        return
    initial_limits = resource.getrlimit(resource.RLIMIT_AS)
    for line in sys.stdin:
        request = json.loads(line)
        limit = _address_space() + request["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, initial_limits[1]))
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        try:
            answer = json.dumps({"text": _render(render_jinja_template, request)})
        except Exception as error:  # a template may raise whatever it likes
            answer = json.dumps({"failed": _reason(error)})
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, initial_limits)
        answers.write(answer + "\n")


def _render(render_jinja_template: Any, request: Mapping[str, Any]) -> str:
    (text,), _ = render_jinja_template(
        conversations=[request["messages"]], chat_template=request["template"], **request["variables"]
    )
    return str(text)


def _address_space() -> int:
    """Bytes of this process's address space."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    # what a template raises on purpose says enough
    raised_on_purpose = type(error).__module__.startswith("jinja2") and text
    return text if raised_on_purpose else f"{type(error).__name__}: {text}".removesuffix(": ")


if __name__ == "__main__":
    main()
