"""What memory that the model calls for costs on the CPU, fp32, in decoding steps: one short and one long invocation, in
torch and in a bundle, and where the time goes; and what decoding without invocations costs beside the unpatched model.

A synthetic Qwen3-VL decoder with an image of 64 visual tokens. In torch an invocation is the query, the former, and a
step for each placeholder and for the end token; in a bundle those are one chunk. At the end the parameters at
Qwen2.5-VL-7B's sizes, with the query builder as published and with narrower ones.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _synthetic
import numpy as np
import torch
from _measure import Report, interleaved, parser, ratios
from bench_decode import IMAGE_TOKENS, TEXT, Bundle, Torch, prompt

import passes
from exporters.export import export_bundle
from exporters.onnxruntime.bundle_runtime import BundleRuntime
from exporters.runtime.invocation import form
from surgeon import models
from surgeon.memory.invoked_memory import InvokedMemory
from surgeon.memory.memory_tokens import KINDS, Kind
from surgeon.memory.query_builder import QueryBuilder
from surgeon.patch import patch
from surgeon.recipe import Recipe

CACHE, PROMPT = 1024, 256
SLOWER = 1.03
"""How much slower decoding without invocations may be than the unpatched model's."""
SIZES_7B = {"hidden_size": 3584, "vision": 1280, "blocks": 32, "kv_width": 512}


def milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        function()
    return (time.perf_counter() - start) * 1e3


class TorchForms:
    """The parts of an invocation in torch, over what a prompt left in its cache."""

    def __init__(self, model: Any, inputs: Any) -> None:
        self.base = model.model
        self.decoder, self.vismem = self.base.language_model, self.base.vismem
        cache = Torch(model, inputs).cache
        memory = InvokedMemory.of(cache)
        assert memory is not None
        self.images = list(memory.images[0])
        self.hidden_states = self.vismem.seen_and_said(torch.cat(memory.seen(0)), torch.cat(memory.said(0, 0)))
        with torch.inference_mode():
            self.queries = self.query()

    def query(self) -> torch.Tensor:
        queries: torch.Tensor = self.vismem.query_builder(self.hidden_states[None])[0]
        return queries

    def latents(self, kind: Kind) -> torch.Tensor:
        formed: torch.Tensor = (
            self.vismem.short(self.base, self.images, self.queries)
            if kind == "short"
            else self.vismem.long(self.decoder, self.hidden_states, self.queries)
        )
        return formed


class BundleForms:
    """The same in a bundle; feeding is one chunk, of which the cache is cut back after."""

    def __init__(self, runtime: BundleRuntime, inputs: Any) -> None:
        self.runtime = runtime
        self.state, _ = runtime.start(inputs)
        self.remembered = self.state.remembered[0]
        self.begin = self.state.lengths.copy(), self.state.next_positions.copy()

    def query(self) -> Any:
        return self.runtime.run("query_builder", {"hidden_states": self.remembered.seen_and_said()[None]})["queries"]

    def formed(self, kind: Kind) -> Any:
        """Query and latents."""
        return form(self.runtime, self.remembered, kind)

    def invoke(self, kind: Kind) -> Any:
        """All of it."""
        self.state.lengths[:], self.state.next_positions[:] = self.begin
        length, since = self.remembered.length, self.remembered.since
        logits = self.runtime.invoke(self.state, 0, kind)
        self.remembered.length, self.remembered.since = length, since
        return logits


def parameters_7b(width: int | None) -> dict[str, int]:
    """Of each part at Qwen2.5-VL-7B's sizes, with LoRA of rank 16 on the attention of 4 layers and of 32 blocks."""
    hidden, vision, rank = SIZES_7B["hidden_size"], SIZES_7B["vision"], 16
    with torch.device("meta"):
        builder = sum(p.numel() for p in QueryBuilder(hidden, 8, width).parameters())
    decoder_lora = 4 * rank * (2 * (hidden + hidden) + 2 * (hidden + SIZES_7B["kv_width"]))
    vision_lora = SIZES_7B["blocks"] * rank * (vision + 3 * vision + 2 * vision)
    return {
        "query builder": builder,
        "short former": hidden * vision + 8 * 4 * vision + vision_lora,
        "long former": 16 * hidden + decoder_lora,
    }


def main() -> None:
    argument_parser = parser(__doc__.splitlines()[0], "vismem")
    argument_parser.add_argument("--threads", type=int, default=2)
    argument_parser.add_argument("--steps", type=int, default=8)
    argument_parser.add_argument("--repetitions", type=int, default=9)
    options = argument_parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("threads", "steps", "repetitions")} | {"model": TEXT}
    report = Report("vismem", settings | {"prompt": PROMPT, "visual tokens": IMAGE_TOKENS})
    with tempfile.TemporaryDirectory(prefix="surgeon-benchmark-") as name:
        folder = Path(name)
        plain, patched, bundle = folder / "plain", folder / "patched", folder / "bundle"
        _synthetic.save(_synthetic.random_model(_synthetic.config_small(**TEXT)), plain)
        recipe = Recipe.from_arguments(["memory-tokens", "vismem"], 0)
        patch(plain, patched, recipe.make_passes(passes.registry()))
        export_bundle(patched, bundle, dtype=torch.float32, max_length=CACHE)
        plain_bundle = folder / "plain-bundle"
        export_bundle(plain, plain_bundle, dtype=torch.float32, max_length=CACHE)
        models_by_name = {"unpatched": models.load(plain), "patched": models.load(patched)}
        inputs = prompt(models_by_name["patched"].config, PROMPT)
        runtime = BundleRuntime(bundle, provider="cpu", threads=options.threads)
        unpatched_runtime = BundleRuntime(plain_bundle, provider="cpu", threads=options.threads)
        _decoding(report, "torch", {n: Torch(m, inputs) for n, m in models_by_name.items()}, options)
        sides = {"unpatched": Bundle(unpatched_runtime, inputs), "patched": Bundle(runtime, inputs)}
        _decoding(report, "bundle", sides, options)
        _invocations(report, models_by_name["patched"], runtime, inputs, options)
    for width in (None, 1024, 512):
        counts = parameters_7b(width)
        label = "as published" if width is None else f"{width} wide"
        total = sum(counts.values())
        report.figure(f"7B, query builder {label}", counts | {"total": total, "MB in bf16": total * 2 / 1e6})
    report.write(options.out)


def _decoding(report: Report, form_name: str, sides: dict[str, Any], options: Any) -> None:
    """Decoding without invocations, against the unpatched model."""
    for side in sides.values():
        side.decode(4)
    # short turns, of each the fastest step: whatever else runs on the machine only ever adds to one
    tasks = {n: lambda s=s: min(s.decode(options.steps).times) for n, s in sides.items()}  # type: ignore[misc]
    times = interleaved(tasks, 5 * options.repetitions)
    ratio = ratios(times["patched"], times["unpatched"])
    report.check(f"{form_name}: decoding without invocations, patched / unpatched", ratio, "<=", SLOWER, "x")


def _invocations(report: Report, model: Any, runtime: BundleRuntime, inputs: Any, options: Any) -> None:
    in_torch, in_bundle = TorchForms(model, inputs), BundleForms(runtime, inputs)
    decoding, bundle_decoding = Torch(model, inputs), Bundle(runtime, inputs)
    tokens = runtime.memory_tokens
    assert tokens is not None

    def step(side: Any) -> float:
        return float(np.median(side.decode(8).times)) * 1e3

    tasks: dict[str, Callable[[], float]] = {
        "torch step": lambda: step(decoding),
        "bundle step": lambda: step(bundle_decoding),
        "torch query": lambda: milliseconds(in_torch.query),
        "bundle query": lambda: milliseconds(in_bundle.query),
    }
    for kind in KINDS:
        tasks[f"torch {kind} former"] = lambda kind=kind: milliseconds(lambda: in_torch.latents(kind))  # type: ignore[misc]
        tasks[f"bundle {kind} query and former"] = lambda kind=kind: milliseconds(lambda: in_bundle.formed(kind))  # type: ignore[misc]
        tasks[f"bundle {kind}, all of it"] = lambda kind=kind: milliseconds(lambda: in_bundle.invoke(kind))  # type: ignore[misc]
    for task in tasks.values():
        task()
    times = interleaved(tasks, options.repetitions)
    for label, spread in times.items():
        report.figure(label, spread, "ms")
    for kind in KINDS:
        fed = tokens.latents[kind] + 1
        in_steps = {
            "query": ratios(times["torch query"], times["torch step"]).median,
            "former": ratios(times[f"torch {kind} former"], times["torch step"]).median,
            "feeding": float(fed),
        }
        rounded = {part: round(value, 2) for part, value in in_steps.items()}
        report.figure(f"torch: one {kind} invocation of {fed - 1} latents, in decoding steps", rounded | {
            "all": round(sum(in_steps.values()), 2)
        })  # fmt: skip
        whole = ratios(times[f"bundle {kind}, all of it"], times["bundle step"])
        report.figure(f"bundle: one {kind} invocation of {fed - 1} latents, in decoding steps", whole)
        share = ratios(times[f"bundle {kind} query and former"], times[f"bundle {kind}, all of it"])
        report.figure(f"bundle: share of query and former in a {kind} invocation", share)


if __name__ == "__main__":
    main()
