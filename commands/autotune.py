"""`surgeon autotune`."""

import dataclasses
from typing import Any

import click

from commands._options import json_option, print_json


@click.command("autotune")
@click.argument("checkpoint", metavar="CKPT")
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    metavar="ROWS",
    multiple=True,
    default=(1,),
    help="Rows at a time; repeat for more.  [default: 1]",
)
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(1),
    metavar="TOKENS",
    multiple=True,
    default=(1,),
    help="Tokens of a row, 1 while it decodes; repeat for more.  [default: 1]",
)
@click.option(
    "--slots",
    type=click.IntRange(1),
    metavar="TOKENS",
    multiple=True,
    default=(1024,),
    help="Visual tokens in the memory; repeat for more.  [default: 1024]",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="What the model computes in.  [default: the checkpoint's]",
)
@json_option
def autotune(
    checkpoint: str,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    slots: tuple[int, ...],
    dtype: str | None,
    as_json: bool,
) -> None:
    """Tune the fused kernels of a patched checkpoint for this GPU.

    Measures which tile config of each kernel is fastest at the model's sizes and keeps that for GPUs of this kind;
    without it a heuristic chooses. Only the checkpoint's config is read. torch, ONNX Runtime and `surgeon engine` take
    what was measured by themselves on the same GPU; engines built elsewhere take the file with --tile-configs.

    \b
    surgeon autotune OUT --batch 1 --batch 8 --slots 1024
    """
    from exporters.kernels.autotune import tune_checkpoint
    from surgeon import console
    from surgeon.dtypes import PRECISIONS
    from surgeon.progress import progress_bars

    with progress_bars() as progress:
        tuned = tune_checkpoint(
            checkpoint,
            batches=batches,
            lengths=lengths,
            slots=slots,
            dtype=None if dtype is None else str(PRECISIONS[dtype]).removeprefix("torch."),
            progress=progress,
        )
    if as_json:
        print_json({**dataclasses.asdict(tuned), "file": str(tuned.file)})
        return
    rows: list[tuple[Any, ...]] = []
    for graft in tuned.grafts:
        for name, launch in graft.launches.items():
            times = [f"{1e6 * seconds:.2f} us" for seconds in (launch.rule_seconds, launch.seconds)]
            rows.append((graft.size, name.split()[0], *times, launch.tried))
    console.print_table(("size", "launch", "heuristic", "measured best", "ways tried"), rows)
    click.echo(f"kept for {tuned.gpu} in {tuned.file}")


COMMAND = autotune
