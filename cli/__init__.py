"""The command line: one file per command, which parses, calls and prints.

Each imports what it needs when it runs: torch and transformers take seconds.
"""

import signal
import sys

import click

from cli._group import SurgeonGroup
from surgeon import __version__


@click.group(cls=SurgeonGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks, and what the libraries underneath print.")
@click.version_option(__version__, message="surgeon %(version)s")
def cli(debug: bool) -> None:
    """Surgery on pretrained vision-language models: graft memory, prove nothing broke, export.

    \b
    surgeon inspect CKPT
    surgeon import INTERNVL2 CKPT
    surgeon patch CKPT OUT --pass pvm:layers=8,16,24,latent=512
    surgeon export OUT BUNDLE --dtype fp16 --max-length 4096
    surgeon generate BUNDLE --image cat.png --prompt "What is this?"

    CKPT is a directory in transformers' layout (config.json, *.safetensors, tokenizer) or a Hugging Face hub id.
    Exit codes: 0 done, 1 a check failed, 2 wrong use or input, 3 a fault of this tool, 130 interrupted.
    """
    if not debug:
        from surgeon.console import quiet

        quiet()


cli.add_package(sys.modules[__name__])


def main() -> None:
    """The `surgeon` command."""
    # Whoever ends it politely gets what Ctrl-C gives: nothing left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cli(prog_name="surgeon")
