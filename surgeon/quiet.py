"""What the libraries underneath print stays with them; this tool's own warnings are one line each."""

import os
import sys
import warnings
from typing import TextIO


def quiet() -> None:
    """Keep the libraries' warnings and log lines to themselves.

    Call it before transformers is imported: its verbosity is read then.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"(surgeon|passes|exporters|commands)\b")
    warnings.showwarning = _one_line


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {message}", file=file or sys.stderr)
