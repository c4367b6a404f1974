"""`surgeon`: the table of commands, each loaded when it is called, and what becomes of the errors they raise."""

import difflib
import errno
import importlib
import keyword
import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from surgeon.errors import SurgeonError
from surgeon.version import __version__

COMMANDS = {
    "inspect": "Show what a checkpoint, a bundle or a directory of engines is.",
    "import": "Convert a checkpoint of another layout to transformers' own.",
    "passes": "List the passes and the options of each.",
    "patch": "Graft memory layers into a copy of a checkpoint.",
    "validate": "Prove that a later form of a model computes what its source did.",
    "export": "Export a checkpoint, plain or patched, as a bundle of ONNX graphs.",
    "engine": "Build TensorRT engines from a bundle.",
    "generate": "Answer a prompt about images, with any form of a model.",
    "bench": "Measure latency, throughput and memory of forms side by side.",
    "autotune": "Tune the fused kernels of a patched checkpoint for this GPU.",
    "doctor": "Report what is installed, and which backends work here and why.",
}
"""Name -> the first line of its help, in the order of a session. Each is the `COMMAND` of a file in `commands/`."""


class Surgeon(click.Group):
    """Lists the commands without importing them, and turns what one raises into a line on stderr and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"commands.{module_of(name)}").COMMAND
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in COMMANDS and (close := difflib.get_close_matches(args[0], COMMANDS, 1)):
            raise click.UsageError(f"no such command {args[0]!r}; did you mean {close[0]!r}?", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # which shows the help
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            _refuse(error, ctx)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _refuse(error, ctx)
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


def module_of(name: str) -> str:
    """The file of a command: its name, but for a word of Python."""
    return f"{name}_" if keyword.iskeyword(name) else name


def _refuse(error: click.UsageError, ctx: click.Context) -> NoReturn:
    """Wrong use in one line, as every other error."""
    path = " ".join(filter(None, (ctx.command_path, ctx.invoked_subcommand)))
    message = " ".join(error.format_message().split()).removesuffix(".")
    if message[1:2].islower():  # as all others begin
        message = message[:1].lower() + message[1:]
    click.echo(f"error: {message} (see `{path} --help`)", err=True)
    ctx.exit(error.exit_code)


def _explain(error: BaseException) -> tuple[str, int]:
    """The line to print, and the exit code."""
    match error:
        case KeyboardInterrupt():
            return "interrupted", 130
        case SurgeonError():
            return f"error: {error}", error.exit_code
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
            return "error: no space is left where the output goes", 2
    first_line = next(iter(str(error).strip().splitlines()), "")
    what = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return f"error: unexpected {what} (run with --debug to see where)", 3


@click.group(cls=Surgeon, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks, and what the libraries underneath print.")
@click.version_option(__version__, message="surgeon %(version)s")
def cli(debug: bool) -> None:
    """Surgery on pretrained vision-language models: graft memory, prove nothing broke, export.

    \b
    surgeon inspect CKPT
    surgeon patch CKPT OUT --pass pvm:layers=8,16,24,latent=512
    surgeon validate CKPT OUT
    surgeon export OUT BUNDLE --dtype fp16 --max-length 4096
    surgeon generate BUNDLE --image cat.png --prompt "What is this?"

    CKPT is a directory in transformers' layout (config.json, *.safetensors, tokenizer) or a Hugging Face hub id.
    Exit codes: 0 done, 1 a check failed, 2 wrong use or input, 3 an internal error, 130 interrupted.
    """
    if not debug:
        from surgeon.quiet import quiet

        quiet()


def main() -> None:
    """The `surgeon` command."""
    # Whoever ends it politely gets what Ctrl-C gives: nothing left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cli(prog_name="surgeon")


if __name__ == "__main__":
    main()
