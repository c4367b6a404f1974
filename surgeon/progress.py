"""How long work says how far it is, and the bars that a person sees of it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`: what is going on, how much of it is done, how much there is; bytes, layers,
tensors or prompts."""


@contextmanager
def progress_bars() -> Iterator[Progress | None]:
    """A callback that draws a bar per stage on stderr and leaves nothing behind; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TextColumn("{task.fields[amount]}"),
        rich.TimeRemainingColumn(),
    )
    tasks: dict[str, rich.TaskID] = {}
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, amount="")
            bars.update(tasks[stage], completed=done, total=total, amount=_amount(done, total))

        yield update


def _amount(done: int, total: int) -> str:
    """Layers and tensors are counted in thousands at most: what is more is bytes."""
    from rich.filesize import decimal

    return f"{done}/{total}" if total < 100_000 else f"{decimal(done)}/{decimal(total)}"
