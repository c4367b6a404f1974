"""Decoding on the CPU, fp32: a bundle in ONNX Runtime against transformers eager (sdpa, DynamicCache).

A model with PVM on 3 of 12 layers, gates open, an image of 64 visual tokens in its memory. "Cache 1024" is a bundle
of max_length 1024. Each is measured after a short prompt, and after one that nearly fills the cache; both sides decode
the same greedy tokens after the same prompt, and stop where they differ.

A decoding step cannot be faster than its weights are read, so that time is measured in the same run, in turns with the
others, and what it would make of transformers' speed is printed as the ceiling of the ratio.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _synthetic
import numpy as np
import torch
from _measure import Report, Spread, interleaved, parser, ratios
from transformers import DynamicCache

import passes
from exporters.export import export_bundle
from exporters.onnxruntime.bundle_runtime import BundleRuntime
from surgeon import models
from surgeon.families import family
from surgeon.inputs import ModelInputs
from surgeon.patch import patch
from surgeon.recipe import Recipe

TEXT = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
TARGETS = {1024: 2.5, 8192: 3.0}
GRID = (1, 16, 16)
IMAGE_TOKENS = 64


def make_checkpoint(directory: Path) -> Path:
    """A patched checkpoint with open gates."""
    plain, closed, target = directory / "plain", directory / "closed", directory / "patched"
    _synthetic.save(_synthetic.random_model(_synthetic.config_small(**TEXT)), plain)
    recipe = Recipe.from_arguments(["pvm:layers=3,6,9,latent=256"], 0)
    patch(plain, closed, recipe.make_passes(passes.registry()))
    model = models.load(closed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pvm.alpha"):
                parameter.fill_(0.7)
    _synthetic.save(model, target)
    return target


def prompt(config: Any, length: int) -> ModelInputs:
    """An image of 64 tokens and random text, `length` tokens in all."""
    generator = np.random.default_rng(0)
    ids = generator.integers(5, 256, (1, length))
    ids[0, 4], ids[0, 5 + IMAGE_TOKENS] = config.vision_start_token_id, config.vision_end_token_id
    ids[0, 5 : 5 + IMAGE_TOKENS] = config.image_token_id
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = generator.standard_normal((GRID[1] * GRID[2], width)).astype(np.float32)
    return ModelInputs(
        family=family("qwen3_vl"),
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        mm_token_type_ids=(ids == config.image_token_id).astype(np.int64),
        pixel_values=[[pixels]],
        grids=[[GRID]],
    )


@dataclass(frozen=True)
class Decoded:
    times: list[float]
    """Seconds of each step."""
    cpu: float
    """Processor seconds of all steps and threads."""
    tokens: list[int]


class Torch:
    """transformers, token by token, as `generate` does it but without its bookkeeping."""

    def __init__(self, model: Any, inputs: ModelInputs) -> None:
        self.model, self.length = model, inputs.input_ids.shape[1]
        self.cache = DynamicCache(config=model.config.get_text_config())
        with torch.inference_mode():
            output = model(**inputs.model_kwargs(), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.first = output.logits[0, -1]
        self.delta = int(model.model.rope_deltas.flatten()[0])

    def decode(self, steps: int) -> Decoded:
        """Decode greedily. The cache is cut back to the prompt first, which is not timed."""
        excess = self.cache.get_seq_length() - self.length
        if excess:
            self.cache.crop(-excess)
        assert self.cache.get_seq_length() == self.length
        times, tokens, chosen, cpu = [], [], self.first.argmax(), time.process_time()
        with torch.inference_mode():
            for step in range(steps):
                start = time.perf_counter()
                output = self.model(
                    input_ids=chosen.view(1, 1),
                    position_ids=torch.full((3, 1, 1), self.length + step + self.delta),
                    past_key_values=self.cache,
                    use_cache=True,
                )
                chosen = output.logits[0, -1].argmax()
                tokens.append(int(chosen))
                times.append(time.perf_counter() - start)
        return Decoded(times, time.process_time() - cpu, tokens)


class Bundle:
    def __init__(self, runtime: BundleRuntime, inputs: ModelInputs) -> None:
        self.runtime = runtime
        self.state, self.first = runtime.start(inputs)
        self.begin = self.state.lengths.copy(), self.state.next_positions.copy()

    def decode(self, steps: int) -> Decoded:
        """As `Torch.decode`."""
        self.state.lengths[:], self.state.next_positions[:] = self.begin
        times, tokens, chosen, cpu = [], [], self.first.argmax(-1), time.process_time()
        for _ in range(steps):
            start = time.perf_counter()
            chosen = self.runtime.step(self.state, chosen).argmax(-1)
            tokens.append(int(chosen[0]))
            times.append(time.perf_counter() - start)
        return Decoded(times, time.process_time() - cpu, tokens)


class Weights:
    """The matrices that a decoding step multiplies with, each read once: the least that a step can take."""

    def __init__(self, model: Any) -> None:
        decoder = model.model.language_model.layers
        self.matrices = [p.detach() for n, p in decoder.named_parameters() if p.ndim == 2 and "pvm" not in n]
        self.matrices.append(model.lm_head.weight.detach())
        self.inputs = {matrix.shape[1]: torch.randn(matrix.shape[1]) for matrix in self.matrices}

    def read(self) -> float:
        """Seconds of a matrix-vector product with each."""
        start = time.perf_counter()
        for matrix in self.matrices:
            torch.mv(matrix, self.inputs[matrix.shape[1]])
        return time.perf_counter() - start


def compare(runtime: BundleRuntime, model: Any, length: int, steps: int, repetitions: int) -> dict[str, Spread]:
    """Tokens per second of both after a prompt of `length`, and under `weights` of reading the weights alone; under
    `<side> undisturbed` those of the fastest quarter of each repetition's steps, and under `<side> processor` those per
    second of processor time: other programs on the machine disturb these less."""
    inputs = prompt(model.config, length)
    sides: dict[str, Bundle | Torch] = {"bundle": Bundle(runtime, inputs), "torch": Torch(model, inputs)}
    weights = Weights(model)
    warm = {name: side.decode(8).tokens for name, side in sides.items()}
    if warm["bundle"] != warm["torch"]:
        raise SystemExit(f"the bundle and torch decode different tokens: {warm}")
    less: dict[str, list[float]] = {f"{name} {how}": [] for name in sides for how in ("undisturbed", "processor")}

    def speed(name: str) -> float:
        decoded = sides[name].decode(steps)
        quarter = sorted(decoded.times)[: max(1, steps // 4)]
        less[f"{name} undisturbed"].append(len(quarter) / sum(quarter))
        less[f"{name} processor"].append(steps / decoded.cpu)
        return steps / sum(decoded.times)

    tasks = {name: lambda name=name: speed(name) for name in sides}  # type: ignore[misc]
    tasks["weights"] = lambda: steps / sum(weights.read() for _ in range(steps))
    speeds = interleaved(tasks, repetitions)
    return speeds | {name: Spread(tuple(values)) for name, values in less.items()}


def main() -> None:
    argument_parser = parser(__doc__.splitlines()[0], "decode")
    argument_parser.add_argument("--threads", type=int, default=2)
    argument_parser.add_argument("--steps", type=int, default=48)
    argument_parser.add_argument("--repetitions", type=int, default=5)
    argument_parser.add_argument("--cache", type=int, choices=list(TARGETS), nargs="+", default=list(TARGETS))
    options = argument_parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"threads": options.threads, "steps": options.steps, "repetitions": options.repetitions, "model": TEXT}
    report = Report("decode", settings)
    with tempfile.TemporaryDirectory(prefix="surgeon-benchmark-") as name:
        checkpoint = make_checkpoint(Path(name))
        model = models.load(checkpoint)
        assert model.config.get_text_config()._attn_implementation == "sdpa"
        for cache in options.cache:
            bundle = Path(name) / f"bundle-{cache}"
            export_bundle(checkpoint, bundle, dtype=torch.float32, max_length=cache)
            runtime = BundleRuntime(bundle, provider="cpu", threads=options.threads)
            for kind, length in (("short", 128), ("full", cache - options.steps - 8)):
                speeds = compare(runtime, model, length, options.steps, options.repetitions)
                label = f"cache {cache}, prompt of {length} ({kind})"
                report.figure(f"{label}: bundle", speeds["bundle"], "tokens/s")
                report.figure(f"{label}: transformers", speeds["torch"], "tokens/s")
                ratio = ratios(speeds["bundle"], speeds["torch"])
                report.check(f"{label}: bundle / transformers", ratio, ">=", TARGETS[cache], "x")
                ceiling = ratios(speeds["weights"], speeds["torch"])
                report.figure(f"{label}: reading the weights alone / transformers", ceiling, "x")
                for how, basis in (("undisturbed", "fastest quarter of steps"), ("processor", "processor time")):
                    quick = ratios(speeds[f"bundle {how}"], speeds[f"torch {how}"])
                    report.figure(f"{label}: bundle / transformers by {basis}", quick, "x")
    report.write(options.out)


if __name__ == "__main__":
    main()
