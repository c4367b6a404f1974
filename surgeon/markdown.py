"""Markdown around values that come from outside: names and options cannot end the place that they stand in."""

import re
import shlex
from collections.abc import Iterable, Sequence


def plain(text: object) -> str:
    """Text in a line or a table's cell that is shown as it is."""
    return re.sub(r"([\\`*\[\]<>|~#]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """An inline code span, in a line or a table's cell."""
    line = " ".join(str(text).split()).replace("|", r"\|")
    fence = "`" * (1 + _longest_run(line))
    return f"{fence} {line} {fence}" if "`" in line or not line else f"{fence}{line}{fence}"


def fenced(text: str, language: str) -> str:
    """A code block."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command(name: str, paths: Sequence[str], *options: str) -> list[str]:
    """The words of a command of this tool, in which no path is taken for an option."""
    return ["surgeon", name, *(f"./{path}" if path.startswith("-") else path for path in paths), *options]


def commands(*lines: Sequence[str]) -> str:
    """A code block of command lines, each given by its words, which are quoted for a shell."""
    return fenced("\n".join(shlex.join(words) for words in lines), "bash")


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
