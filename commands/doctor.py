"""`surgeon doctor`."""

import dataclasses
from pathlib import Path

import click

from commands._options import json_option, print_json


@click.command("doctor")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    default=Path("."),
    help="The directory whose file system is tried and in which leftovers are looked for.  [default: this one]",
)
@json_option
def doctor(directory: Path, as_json: bool) -> None:
    """Report what is installed, and which backends work here and why.

    Each backend is tried: a session is created and a tensor computed. Leftovers of killed runs in the directory
    (.NAME.staging-*, .NAME.old-*) are listed.

    \b
    surgeon doctor --dir /data/checkpoints
    """
    from surgeon.console import report_diagnosis
    from surgeon.doctor import diagnose

    diagnosis = diagnose(directory)
    print_json(dataclasses.asdict(diagnosis)) if as_json else report_diagnosis(diagnosis)


COMMAND = doctor
