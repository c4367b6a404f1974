"""The command line: parse, call, print."""

import dataclasses
import json
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, Literal

import click

from exporters.forms import form_of
from surgeon import __version__
from surgeon.errors import SurgeonError

# torch and transformers take seconds to import: each command imports what it needs when it runs.


class SurgeonGroup(click.Group):
    """Turns what a command raises into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:  # the last resort: what nobody foresaw is one line too
            if ctx.params.get("debug"):
                traceback.print_exc()
            message, code = _explain(error)
        click.echo(" ".join(message.splitlines()), err=True)
        ctx.exit(code)


def _explain(error: BaseException) -> tuple[str, int]:
    """The line to print, and the exit code."""
    match error:
        case KeyboardInterrupt():
            return "interrupted", 130
        case SurgeonError():
            return f"error: {error}", error.exit_code
    reason = next(iter(str(error).strip().splitlines()), "")
    return f"error: unexpected {type(error).__name__}: {reason} (run with --debug to see where)", 3


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


positions_option = click.option(
    "--positions",
    type=click.Choice(["dhr", "plain"]),
    help="For a model with RoPE-DHR: tiles at the ids of the thumbnail patches they cover (long contexts), or tokens "
    "one after the other (reading text).  [default: dhr]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else there.")


backend_option = click.option(
    "--backend",
    type=click.Choice(["ort-cpu", "ort-cuda", "ort-tensorrt-rtx"]),
    help="What ONNX Runtime computes a bundle with.  [default: CUDA where it works, else the CPU]",
)


def provider_of(backend: str | None, *paths: str) -> Any:
    """ONNX Runtime's provider that --backend names."""
    if backend is None:
        return "auto"
    if all(form_of(path) != "bundle" for path in paths):
        raise click.UsageError(f"--backend {backend} is for bundles, and there is none among {', '.join(paths)}")
    return backend.removeprefix("ort-")


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@cli.command()
@click.argument("path", metavar="CKPT|BUNDLE|ENGINES")
@json_option
@click.option("--image", type=click.Path(path_type=Path), help="A picture, to draw where its tokens stand.")
@click.option("--out", type=click.Path(path_type=Path), help="The drawing: a .png, .svg or .pdf file.")
def inspect(path: str, as_json: bool, image: Path | None, out: Path | None) -> None:
    """What a checkpoint is: family, sizes, where grafts can go, what is grafted, parameters per part.

    No weight is read, and a directory with a config.json alone is enough. With --image and --out, for a family that
    cuts pictures into tiles: a drawing of the picture's tiles and thumbnail, coloured by position id.

    \b
    surgeon inspect ./Qwen3-VL-8B-Instruct
    surgeon inspect ./patched --json | jq '.grafts'
    surgeon inspect ./InternVL3-2B --image x.png --out positions.png
    """
    if (image is None) != (out is None):
        raise click.UsageError("--image and --out go together: the picture, and the file to draw to")
    if image is not None and out is not None:
        from surgeon.positions_picture import draw_positions

        click.echo(f"{image}: {draw_positions(Path(path), image, out).describe()}; drawn in {out}", err=as_json)
        return
    from surgeon import console

    if form_of(path) == "engines":
        from exporters.tensorrt.show import inspect_engines

        found_engines = inspect_engines(path, show=not as_json)
        if as_json:
            print_json(found_engines.model_dump(mode="json"))
    elif form_of(path) == "bundle":
        from exporters.onnx.manifest import Manifest

        manifest = Manifest.load(path).model_dump(mode="json")
        print_json(manifest) if as_json else console.show_bundle(path, manifest)
    else:
        from surgeon.inspect import inspect_checkpoint

        found = inspect_checkpoint(path)
        print_json(found.model_dump(mode="json")) if as_json else console.show_inspection(found)


@cli.command()
@json_option
def passes(as_json: bool) -> None:
    """The passes, and the options of each.

    A pass is a rewrite of the model; `patch --pass NAME:option=value,...` runs it.

    \b
    surgeon passes
    """
    from passes import registry
    from surgeon.console import show_passes
    from surgeon.inspect import describe_passes

    described = describe_passes(registry())
    print_json([each.model_dump(mode="json") for each in described]) if as_json else show_passes(described)


@cli.command("import")
@click.argument("source", metavar="CKPT")
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--image-token-id",
    type=click.IntRange(0),
    help="The id of the token that pictures take the place of, for a checkpoint without a tokenizer.  [default: where "
    "published checkpoints have <IMG_CONTEXT>]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the new one is complete.")
@json_option
def import_command(source: str, target: Path, image_token_id: int | None, overwrite: bool, as_json: bool) -> None:
    """Convert a checkpoint that needs code of its own into one that transformers loads itself.

    CKPT is an InternVL as published (internvl_chat; InternLM2, Qwen2, Qwen3 or Llama inside), which becomes
    transformers' internvl, or a CoMemo (comemo_chat), which becomes that with mixin layers and RoPE-DHR. Its Python is
    never run. Values and dtype are kept, tensors streamed one at a time; tokenizer, chat template and image processor
    come along. OUT appears complete or not at all.

    \b
    surgeon import ./InternVL2-2B ./internvl2-2b
    surgeon import ./CoMemo-2B ./comemo-2b
    """
    from surgeon import console
    from surgeon.importers import import_checkpoint

    with console.progress() as progress:
        report = import_checkpoint(
            source, target, image_token_id=image_token_id, overwrite=overwrite, progress=progress
        )
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        print_json({"target": str(target), **dataclasses.asdict(report)})
        return
    click.echo(f"wrote {target}: {report.model_type} ({report.text_model} inside), {report.bytes_written:,} bytes")
    click.echo(f"{report.parameters:,} parameters in {report.tensors:,} tensors")
    for kind, layers in report.grafts.items():
        click.echo(f"grafted {kind} at layers {', '.join(map(str, layers))}")


@cli.command("patch")
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
    as_json: bool,
) -> None:
    """Write a patched copy of a checkpoint: the source's weights as they are, the new ones in a file of their own.

    Until it is trained the copy computes exactly what the source does. OUT appears complete or not at all; the recipe
    that made it is in OUT/surgeon-recipe.yaml.

    \b
    surgeon patch CKPT OUT --pass pvm:layers=8,16,24,latent=512
    surgeon patch CKPT OUT --recipe examples/recipes/qwen3-vl-8b-pvm.yaml --weights link
    surgeon patch CKPT --pass pvm:layers=every:4 --dry-run
    """
    if bool(arguments) == bool(recipe):
        raise click.UsageError("say what to do, with --pass NAME:OPT=VAL,... or with --recipe FILE, not both")
    if target is None and not dry_run:
        raise click.UsageError("missing argument OUT: where to write the patched checkpoint (or add --dry-run)")

    from passes import registry
    from surgeon import console
    from surgeon.checkpoint import Checkpoint, check_target
    from surgeon.patch import patch, plan
    from surgeon.recipe import Recipe

    chosen = Recipe.read(recipe) if recipe else Recipe.from_arguments(arguments)
    seed = chosen.seed if seed is None else seed
    to_run = chosen.make_passes(registry())
    if dry_run:
        with Checkpoint.open(source, weights="optional") as checkpoint:
            report = plan(checkpoint, to_run, seed)[1]
        if target is not None:
            check_target(target, overwrite, protect=[checkpoint.directory])
    else:
        assert target is not None
        with console.progress() as progress:
            report = patch(source, target, to_run, seed=seed, weights=weights, overwrite=overwrite, progress=progress)
    if as_json:
        about = {"target": None if dry_run else str(target), "dry_run": dry_run, "seed": seed}
        print_json({**about, "new_parameters": report.new_parameters, **dataclasses.asdict(report)})
    else:
        console.show_patch(report, None if dry_run else target)


@cli.command()
@click.argument("source", metavar="CKPT")
@click.argument("target", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    required=True,
    help="What the graphs compute in. Weights of another dtype are converted once; the others stay where they are.",
)
@click.option(
    "--max-length",
    type=click.IntRange(2),
    default=4096,
    show_default=True,
    help="Tokens that the key-value cache holds: prompt, pictures and answer together.",
)
@click.option(
    "--measure/--no-measure",
    default=True,
    help="fp16: run the graphs in fp32 over a few pictures and prompts, and keep in fp32 what would overflow. It takes "
    "the time of five prompts on this CPU.  [default: measure]",
)
@click.option("--overwrite", is_flag=True, help="Replace BUNDLE, once the new one is complete.")
@json_option
def export(
    source: str, target: Path, dtype: str, max_length: int, measure: bool, overwrite: bool, as_json: bool
) -> None:
    """Write an ONNX bundle of a checkpoint, plain or patched: the graphs, and everything a runtime needs to know.

    The graphs point into the checkpoint's weights where they can, so keep it where it is.

    \b
    surgeon export OUT BUNDLE --dtype fp16 --max-length 8192
    """
    from exporters.onnx.bundle import DTYPES, export_bundle
    from surgeon import console

    with console.progress() as progress:
        manifest = export_bundle(
            source,
            target,
            dtype=DTYPES[dtype],
            max_length=max_length,
            overwrite=overwrite,
            progress=progress,
            measure=measure,
        )
    if measure and manifest.precision is not None and manifest.precision.skipped is not None:
        click.echo(f"warning: what overflows fp16 was not measured: {manifest.precision.skipped}", err=True)
    written = manifest.model_dump(mode="json")
    print_json(written) if as_json else console.show_bundle(target, written)


@cli.command()
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
@click.option("--picture-tokens", metavar="LOW..HIGH", help="Visual tokens of one picture.  [default: as prefill]")
@click.option(
    "--visual-tokens",
    metavar="1..HIGH",
    help="Visual tokens that the memory of one row holds, of all its pictures.  [default: as prefill]",
)
@click.option("--graph", "graphs", multiple=True, help="Build the engine of this graph alone; repeat for more.")
@click.option(
    "--kernels",
    type=click.Choice(["standard", "fused"]),
    default="standard",
    show_default=True,
    help="What computes the grafts: standard operators, or the tool's own kernels as plugins (needs Triton).",
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
    picture_tokens: str | None,
    visual_tokens: str | None,
    graphs: tuple[str, ...],
    kernels: Literal["standard", "fused"],
    timing_cache: Path | None,
    cache: Path | None,
    strict: bool,
    serve_layout: str | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Build NVIDIA engines of a bundle, with TensorRT or TensorRT for RTX.

    The library works in a process of its own. Ranges are LOW..HIGH, or LOW..USUAL..HIGH with the size to be fastest
    for. OUT appears complete or not at all; OUT/layers.json says which operators became fused kernels.

    \b
    surgeon engine BUNDLE OUT --target sm89,sm120 --prefill 1..4096 --batch 1..8
    surgeon engine BUNDLE OUT --backend tensorrt --target native --timing-cache timings
    surgeon engine BUNDLE OUT --target sm89 --serve-layout triton
    surgeon engine BUNDLE --target sm89 --dry-run
    """
    if target is None and not dry_run:
        raise click.UsageError("missing argument OUT: where to write the engines (or add --dry-run)")
    from exporters.tensorrt import show
    from exporters.tensorrt.build import Options, build_engines, plan_engines
    from exporters.tensorrt.profiles import Limits
    from surgeon import console

    limits = Limits.parse(prefill, batch, picture_tokens, visual_tokens)
    options = Options(backend, capabilities, dtype, limits, timing_cache, cache, strict, graphs, kernels)
    if serve_layout is not None:
        from exporters.serving import triton

        triton.check_graphs(graphs)
    if dry_run:
        plan = plan_engines(bundle, options, target, overwrite)
        print_json(show.plan_json(plan, capabilities)) if as_json else show.show_plan(plan, capabilities)
        return
    assert target is not None
    with console.progress() as progress:
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
        print_json(show.built_json(built))
    else:
        show.show_engines(target, built.manifest, built.report, built)


@cli.command()
@click.argument("path", metavar="CKPT|BUNDLE|ENGINES")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; repeat for more.")
@click.option("--prompt", required=True, help="What to ask.")
@click.option("--system", help="The system prompt.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="The longest answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default="0, greedy", help="Sample at this.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the likeliest P of probability.")
@click.option("--top-k", type=click.IntRange(1), help="Sample from the K likeliest tokens.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the sampling.")
@positions_option
@backend_option
@json_option
def generate(
    path: str,
    images: tuple[Path, ...],
    prompt: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    positions: Literal["dhr", "plain"] | None,
    backend: str | None,
    as_json: bool,
) -> None:
    """Answer a prompt about pictures, with a checkpoint in torch, a bundle in ONNX Runtime or engines on a GPU.

    The text comes on stdout as it is made. Pictures are shown to the model in the order they are given.

    \b
    surgeon generate CKPT --image cat.png --prompt "What is this?"
    surgeon generate BUNDLE --image a.png --image b.png --prompt "Compare them." --temperature 0.7 --top-p 0.9
    """
    if not temperature and (top_p is not None or top_k is not None):
        raise click.UsageError("--top-p and --top-k shape sampling, and without --temperature nothing is sampled")
    from surgeon.generation import Sampling
    from surgeon.inputs import Prompt

    asked, sampling = Prompt(prompt, images, system), Sampling(temperature, top_k, top_p, seed)

    def show(text: str) -> None:
        if not as_json:
            click.echo(text, nl=False)

    provider = provider_of(backend, path)
    found: Any
    if (form := form_of(path)) != "checkpoint":
        from exporters import runtime

        model: runtime.Runtime
        if form == "engines":
            from exporters.tensorrt.runtime import EngineRuntime

            model = EngineRuntime(path)
        else:
            model = runtime.BundleRuntime(path, provider=provider)
        (found,) = runtime.generate(model, [asked], max_new_tokens, sampling, lambda row, text: show(text), positions)
    else:
        from surgeon.torch_generate import answer

        found = answer(path, asked, max_new_tokens, sampling, show, positions=positions)
    print_json(dataclasses.asdict(found)) if as_json else click.echo()


@cli.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="Your own picture; repeat.")
@click.option("--prompt", help="Your own prompt, instead of the ones that come with the tool.")
@click.option(
    "--steps", type=click.IntRange(1), default=32, show_default=True, help="Tokens decoded after each prompt."
)
@positions_option
@backend_option
@click.option("--report", "report_file", type=click.Path(path_type=Path), help="Write the whole verdict as JSON.")
@click.option("--overwrite", is_flag=True, help="Replace the report file.")
@json_option
def validate(
    a: str,
    b: str,
    images: tuple[Path, ...],
    prompt: str | None,
    steps: int,
    positions: Literal["dhr", "plain"] | None,
    backend: str | None,
    report_file: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Prove that a later form of a model computes what an earlier one did. A and B: checkpoints, bundles or engines.

    Compared are the logits over each prompt and over every decoding step, and the greedy tokens; a failure names the
    first layer that is wrong. What must hold depends on the two: a fresh patch gives its source's logits bit for bit,
    an fp32 bundle the checkpoint's to 1e-4 with the same tokens, fp16 and bf16 ones to stated bounds. Exits with 1
    where it does not hold.

    \b
    surgeon validate CKPT PATCHED
    surgeon validate PATCHED BUNDLE --image cat.png --prompt "What is this?" --report report.json
    """
    from surgeon import console

    if report_file is not None:
        from surgeon.checkpoint import check_target

        check_target(report_file, overwrite, directory=False)
    provider = provider_of(backend, a, b)
    from exporters.runtime.validation import validate_pair

    with console.progress() as progress:
        report = validate_pair(a, b, images, prompt, steps, progress, positions, provider)
    if report_file is not None:
        from surgeon.checkpoint import staged_file

        with staged_file(report_file, overwrite) as staging:
            staging.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    print_json(report.to_json()) if as_json else console.show_report(report)
    if not report.passed:
        click.get_current_context().exit(1)


@cli.command()
@click.argument("paths", metavar="A B ...", nargs=-1, required=True)
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; repeat for more.")
@click.option("--prompt", help="What to ask.  [default: to describe the picture]")
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens of each answer.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Prompts at a time.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Measurements of each.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads of each.  [default: the library's]")
@backend_option
@click.option("--out", type=click.Path(path_type=Path), help="Draw the figures: a .png, .svg or .pdf file.")
@json_option
def bench(
    paths: tuple[str, ...],
    images: tuple[Path, ...],
    prompt: str | None,
    tokens: int,
    batch: int,
    rounds: int,
    threads: int | None,
    backend: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Latency, tokens per second and memory of checkpoints, bundles and engines, side by side.

    Each is loaded in a process of its own, all at the same time, and they are measured in turns. The tokens are greedy
    and an answer does not end early. Without --image it is about a picture of this tool's own.

    \b
    surgeon bench CKPT BUNDLE --tokens 128 --out bench.png
    """
    from exporters.bench import Workload, draw, measure
    from surgeon import console
    from surgeon.parity.cases import default_cases

    (own,) = default_cases()[0].prompts
    pictures = images or tuple(Path(str(picture)) for picture in own.images)
    provider = provider_of(backend, *paths)
    workload = Workload(prompt or own.text, pictures, tokens, batch, rounds, threads, provider)
    with console.progress() as progress:
        found = measure(paths, workload, progress)
    if out is not None:
        draw(found, out)
    figures = [each.as_dict() for each in found]
    print_json(figures) if as_json else console.show_bench(figures)


@cli.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    default=Path("."),
    help="The directory whose file system is tried.  [default: this one]",
)
@json_option
def doctor(directory: Path, as_json: bool) -> None:
    """What is installed, which backends work on this machine, and why the others do not.

    Each backend is really tried: a session is made, a tensor is computed.

    \b
    surgeon doctor --dir /data/checkpoints
    """
    from surgeon.console import show_diagnosis
    from surgeon.doctor import diagnose

    found = diagnose(directory)
    print_json(dataclasses.asdict(found)) if as_json else show_diagnosis(found)


def main() -> None:
    """The `surgeon` command."""
    # Whoever ends it politely gets what Ctrl-C gives: nothing left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cli(prog_name="surgeon")


if __name__ == "__main__":
    main()
