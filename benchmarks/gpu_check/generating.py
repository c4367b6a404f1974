"""Part 5: transformers' own `generate` with a patched model, eager and compiled, fused and plain."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StoppingCriteria

from benchmarks._measure import Spread, interleaved, ratios
from benchmarks._synthetic import QWEN3_VL_8B
from benchmarks.gpu_check import grafts
from benchmarks.gpu_check.counting import chains_of, counted_chains
from benchmarks.gpu_check.part import PartReport, Setting
from benchmarks.gpu_check.timing import Timer
from exporters.kernels.cuda import use_fused


def prompt(model: Any, side: int, text_length: int) -> dict[str, Tensor]:
    """An image of side x side patches, four of which become one visual token, and text behind it."""
    config, vision = model.config, model.config.vision_config
    image = [config.vision_start_token_id, *[config.image_token_id] * (side * side // 4), config.vision_end_token_id]
    ids = torch.tensor([image + list(range(10, 10 + text_length))], device=model.device)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(side * side, width, device=model.device, dtype=model.dtype),
        "image_grid_thw": torch.tensor([[1, side, side]], device=model.device),
    }


class Stamps(StoppingCriteria):
    """When each token was there."""

    def __init__(self, clock: Timer) -> None:
        self.clock, self.times = clock, list[float]()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.times.append(self.clock.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def per_token(self) -> float:
        """Seconds of a decoding step; the first two tokens are the prefill's and the first step's."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def generate(
    fused: bool, model: Any, inputs: dict[str, Tensor], tokens: int, clock: Timer, **options: Any
) -> tuple[list[int], float]:
    """Exactly so many greedy tokens -> those of the first row, and the seconds that each takes. Raises AssertionError
    where fused kernels were to run and did not, or the other way round."""
    use_fused(model, fused)
    stamps = Stamps(clock)
    with counted_chains() as chains:
        token_ids = model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[stamps],
            **options,
        )
    expected = chains_of(model, reads=tokens * fused, fills=fused)
    # compiled, a step is a CUDA graph, whose replays are not seen
    if chains.keys() != expected.keys() or ("disable_compile" in options and chains != expected):
        raise AssertionError(f"{tokens} tokens, fused={fused}: fused kernels ran {dict(chains)}, not {dict(expected)}")
    return token_ids[0, inputs["input_ids"].shape[1] :].tolist(), stamps.per_token()


def compiled(setting: Setting) -> dict[str, Any]:
    """Options of `generate` that have transformers compile the decoding step over a static cache."""
    config = CompileConfig() if not setting.dry else CompileConfig(backend="eager", mode=None)
    if setting.dry:
        config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def check_tokens(setting: Setting, clock: Timer, report: PartReport) -> None:
    """Greedy tokens of a small fp32 model, fused and plain. Raises AssertionError where they differ."""
    layers = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    text = grafts.SMALL_TEXT | setting.pick(layers | {"num_key_value_heads": 4}, {})
    record = grafts.SMALL_PVM | setting.pick({"layers": [1, 3, 5]}, {})
    model = grafts.make_model(grafts.qwen3_vl(text, record), torch.float32, setting.device)
    inputs = prompt(model, setting.pick(32, 4), 7)
    count = setting.pick(128, 4)
    tokens = {on: generate(on, model, inputs, count, clock, disable_compile=True)[0] for on in (True, False)}
    if tokens[True] != tokens[False]:
        raise AssertionError(f"greedy tokens differ: fused {tokens[True]}, plain {tokens[False]}")
    report.figure("small fp32 model: greedy tokens, fused and plain the same", count)


def report_speed(name: str, seconds: Spread, report: PartReport) -> None:
    report.figure(name, Spread(tuple(1 / value for value in seconds.values)), "tokens/s")


@torch.inference_mode()
def main(setting: Setting, clock: Timer, report: PartReport) -> None:
    check_tokens(setting, clock, report)
    text, record = setting.pick((QWEN3_VL_8B, grafts.PVM_8B), (grafts.SMALL_TEXT, grafts.SMALL_PVM))
    model = grafts.make_model(grafts.qwen3_vl(text, record), torch.bfloat16, setting.device)
    inputs = prompt(model, setting.pick(64, 4), setting.pick(32, 5))
    repetitions = setting.pick(3, 1)

    def measure(fused: bool, **options: Any) -> tuple[list[int], float]:
        return generate(fused, model, inputs, setting.pick(80, 4), clock, **options)

    alone: dict[str, Any] = {"disable_compile": True}
    tokens = {on: measure(on, **alone)[0] for on in (True, False)}  # warm
    times = interleaved(
        {name: partial(lambda on: measure(on, **alone)[1], on) for name, on in (("fused", True), ("plain", False))},
        repetitions,
    )
    for name, seconds in times.items():
        report_speed(f"8B, PVM, eager, {name}", seconds, report)
    report.figure("8B, PVM, eager: fused / plain", ratios(times["plain"], times["fused"]), "x")
    parted = (i for i, (one, other) in enumerate(zip(tokens[True], tokens[False], strict=True)) if one != other)
    report.figure("8B, PVM, bf16: greedy tokens, the same fused and plain until", next(parted, len(tokens[True])))

    for name, on in (("fused", True), ("plain", False)):
        torch.compiler.reset()
        begun = clock.now()
        measure(on, **compiled(setting))
        report.figure(f"8B, PVM, compiled, {name}: first call, compilation with it", clock.now() - begun, "s")
        again = tuple(measure(on, **compiled(setting))[1] for _ in range(repetitions))
        report_speed(f"8B, PVM, compiled, {name}", Spread(again), report)
