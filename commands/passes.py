"""`surgeon passes`."""

import click

from commands._options import json_option, print_json


@click.command("passes")
@json_option
def passes(as_json: bool) -> None:
    """List the passes and the options of each.

    A pass is a rewrite of the model; `patch --pass NAME:option=value,...` runs it.

    \b
    surgeon passes
    """
    from passes import registry
    from surgeon.console import report_passes
    from surgeon.inspect import describe_passes

    described = describe_passes(registry())
    print_json([description.model_dump(mode="json") for description in described]) if as_json else report_passes(
        described
    )


COMMAND = passes
