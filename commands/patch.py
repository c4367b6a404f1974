"""`surgeon patch`."""

import dataclasses
from pathlib import Path
from typing import Literal

import click

from commands._options import json_option, print_json


@click.command("patch")
@click.argument("source", metavar="CKPT")
@click.argument("target", metavar="OUT", required=False, type=click.Path(path_type=Path))
@click.option("--pass", "arguments", multiple=True, metavar="NAME:OPT=VAL,...", help="A pass to run; repeat for more.")
@click.option("-r", "--recipe", type=click.Path(path_type=Path), help="A YAML file with the passes to run.")
@click.option("--dry-run", is_flag=True, help="Plan and count only: no weight is read, nothing is written.")
@click.option(
    "--weights",
    type=click.Choice(["auto", "copy", "link"]),
    default="auto",
    show_default=True,
    help="How the source's weight files get into OUT. auto: reflink, else copy. link: reflink, else hard link (no room "
    "taken, but a later write in place to one reaches the other), else copy.",
)
@click.option("--seed", type=click.IntRange(0), help="Seed of the new parameters.  [default: the recipe's, else 0]")
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the new one is complete.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Keep Python files of CKPT, and what in its configs leads to them. None is run here.",
)
@json_option
def patch_command(
    source: str,
    target: Path | None,
    arguments: tuple[str, ...],
    recipe: Path | None,
    dry_run: bool,
    weights: Literal["auto", "copy", "link"],
    seed: int | None,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Graft memory layers into a copy of a checkpoint.

    The source's weights stay as they are, new ones come into a file of their own. Until it is trained the copy computes
    exactly what the source does. OUT appears complete or not at all; the recipe that made it is in
    OUT/surgeon-recipe.yaml, its model card in OUT/README.md.

    \b
    surgeon patch CKPT OUT --pass pvm:layers=8,16,24,latent=512
    surgeon patch CKPT OUT -r examples/recipes/qwen3-vl-8b-pvm.yaml
    surgeon patch CKPT --pass pvm:layers=every:4 --dry-run
    """
    if not arguments and recipe is None:
        raise click.UsageError(
            "nothing says what to graft: add --pass NAME:OPTION=VALUE,... (such as --pass pvm:layers=8,16,24; "
            "`surgeon passes` lists them) or --recipe FILE"
        )
    if arguments and recipe is not None:
        raise click.UsageError("--pass and --recipe exclude each other: write the passes into the recipe")
    if target is None and not dry_run:
        raise click.UsageError("missing argument OUT: where to write the patched checkpoint (or add --dry-run)")

    from passes import registry
    from surgeon.recipe import Recipe

    parsed_recipe = Recipe.read(recipe) if recipe else Recipe.from_arguments(arguments)
    seed = parsed_recipe.seed if seed is None else seed
    to_run = parsed_recipe.make_passes(registry())

    # These take seconds to import; by now a misspelt option has been reported.
    from surgeon import console
    from surgeon.checkpoint import Checkpoint, check_target
    from surgeon.patch import patch, plan
    from surgeon.progress import progress_bars

    if dry_run:
        with Checkpoint.open(source, weights="optional") as checkpoint:
            report = plan(checkpoint, to_run, seed)[1]
        if target is not None:
            check_target(target, overwrite, protect=[checkpoint.directory])
    else:
        assert target is not None
        with progress_bars() as progress:
            report = patch(
                source,
                target,
                to_run,
                seed=seed,
                weights=weights,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
    if as_json:
        about = {"target": None if dry_run else str(target), "dry_run": dry_run, "seed": seed}
        print_json({**about, "new_parameters": report.new_parameters, **dataclasses.asdict(report)})
    else:
        console.report_patch(report, None if dry_run else target)


COMMAND = patch_command
