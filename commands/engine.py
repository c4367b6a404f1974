"""`surgeon engine`."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import click

from commands._options import RenamedOptions, json_option, print_json


class _Engine(RenamedOptions):
    former: ClassVar[Mapping[str, str]] = {"--picture-tokens": "--image-tokens", "--blocks": "--tile-configs"}


@click.command("engine", cls=_Engine)
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", required=False, type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    default="tensorrt-rtx",
    show_default=True,
    help="The library that builds. tensorrt-rtx needs no GPU for it, tensorrt does.",
)
@click.option(
    "--target",
    "capabilities",
    default="native",
    show_default=True,
    metavar="SM80,SM89,...|native",
    help="GPUs to build for, by compute capability; native: the one that is here.",
)
@click.option("--dtype", type=click.Choice(["fp16", "bf16"]), help="What the bundle must be of.  [default: what it is]")
@click.option("--prefill", metavar="LOW..HIGH", help="Tokens of one prefill.  [default: 1 to the bundle's maximum]")
@click.option("--batch", metavar="LOW..HIGH", default="1..8", show_default=True, help="Rows at a time.")
@click.option("--image-tokens", metavar="LOW..HIGH", help="Visual tokens of one image.  [default: as prefill]")
@click.option(
    "--visual-tokens",
    metavar="1..HIGH",
    help="Visual tokens that the memory of one row holds, of all its images.  [default: as prefill]",
)
@click.option("--graph", "graphs", multiple=True, help="Build the engine of this graph alone; repeat for more.")
@click.option(
    "--kernels",
    type=click.Choice(["standard", "fused"]),
    default="standard",
    show_default=True,
    help="What computes the grafts: standard operators, or the tool's own kernels as plugins (needs Triton).",
)
@click.option(
    "--tile-configs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="How fused kernels are cut, as `surgeon autotune` measured it on the GPU.  [default: that "
    "of the GPU that is here, where it was measured]",
)
@click.option("--timing-cache", type=click.Path(path_type=Path), help="A file of TensorRT's timings, read and written.")
@click.option("--cache", type=click.Path(path_type=Path), help="A folder to keep engines in, and to take them from.")
@click.option("--strict", is_flag=True, help="Attention that is not one fused kernel is an error.")
@click.option(
    "--serve-layout",
    type=click.Choice(["triton"]),
    help="Make OUT a model repository of NVIDIA Triton Inference Server, with the engines in OUT/<name>/1/engines.",
)
@click.option("--dry-run", is_flag=True, help="Plan only: no weight is read, nothing is built.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the new one is complete.")
@json_option
def engine(
    bundle: Path,
    target: Path | None,
    backend: Literal["tensorrt", "tensorrt-rtx"],
    capabilities: str,
    dtype: Literal["fp16", "bf16"] | None,
    prefill: str | None,
    batch: str,
    image_tokens: str | None,
    visual_tokens: str | None,
    graphs: tuple[str, ...],
    kernels: Literal["standard", "fused"],
    tile_configs: Path | None,
    timing_cache: Path | None,
    cache: Path | None,
    strict: bool,
    serve_layout: str | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Build TensorRT engines from a bundle.

    With TensorRT, or TensorRT for RTX. The library works in a process of its own. Ranges are LOW..HIGH, or
    LOW..USUAL..HIGH with the size to be fastest for. OUT appears complete or not at all; OUT/layers.json says which
    operators became fused kernels.

    \b
    surgeon engine BUNDLE OUT --target sm89,sm120 --prefill 1..4096 --batch 1..8
    surgeon engine BUNDLE OUT --backend tensorrt --target native
    surgeon engine BUNDLE OUT --target sm89 --serve-layout triton
    surgeon engine BUNDLE --target sm89 --dry-run
    """
    if target is None and not dry_run:
        raise click.UsageError("missing argument OUT: where to write the engines (or add --dry-run)")
    from exporters.tensorrt import report
    from exporters.tensorrt.build import Options, build_engines, plan_engines
    from exporters.tensorrt.profiles import Limits
    from surgeon.progress import progress_bars

    limits = Limits.parse(prefill, batch, image_tokens, visual_tokens)
    options = Options(backend, capabilities, dtype, limits, timing_cache, cache, strict, graphs, kernels, tile_configs)
    if serve_layout is not None:
        from exporters.serving import triton

        triton.check_graphs(graphs)
    if dry_run:
        plan = plan_engines(bundle, options, target, overwrite)
        print_json(report.plan_json(plan, capabilities)) if as_json else report.report_plan(plan, capabilities)
        return
    assert target is not None
    with progress_bars() as progress:
        if serve_layout is None:
            built = build_engines(bundle, target, options, overwrite=overwrite, progress=progress)
        else:
            built = triton.write_repository(
                target,
                lambda engines: build_engines(bundle, engines, options, progress=progress),
                overwrite=overwrite,
                protect=bundle,
            )
    for warning in built.report.warnings():
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        print_json(report.built_json(built))
    else:
        report.report_engines(target, built.manifest, built.report, built)


COMMAND = engine
