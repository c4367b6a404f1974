"""The group of commands: how they are found, and what becomes of what they raise."""

import errno
import importlib
import pkgutil
import traceback
from types import ModuleType
from typing import Any

import click

from surgeon.errors import SurgeonError


class SurgeonGroup(click.Group):
    """Turns what a command raises into one line on stderr and an exit code."""

    def add_package(self, package: ModuleType) -> None:
        """Add the commands of a package: every module's `COMMAND`."""
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                self.add_command(importlib.import_module(f"{package.__name__}.{module.name}").COMMAND)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:  # the last resort: what nobody foresaw is one line too
            if ctx.params.get("debug"):
                traceback.print_exc()
            message, code = _explain(error)
            # what failed while cleaning up after it
            notes = [f" ({note})" for note in getattr(error, "__notes__", [])]
        click.echo(" ".join((message + "".join(notes)).splitlines()), err=True)
        ctx.exit(code)


def _explain(error: BaseException) -> tuple[str, int]:
    """The line to print, and the exit code."""
    match error:
        case KeyboardInterrupt():
            return "interrupted", 130
        case SurgeonError():
            return f"error: {error}", error.exit_code
        case OSError(errno=errno.ENOSPC):
            return "error: no space is left where the output goes", 2
    reason = next(iter(str(error).strip().splitlines()), "")
    return f"error: unexpected {type(error).__name__}: {reason} (run with --debug to see where)", 3
