"""Part 4: how near to the memory's bandwidth the decoding kernels come, launch by launch, and what tuning brings."""

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import Spread, ratios
from benchmarks.gpu_check.grafts import odd_grafts, real_grafts
from benchmarks.gpu_check.numbers import TOLERANCES, relative
from benchmarks.gpu_check.part import PartReport, Setting
from benchmarks.gpu_check.timing import Timer
from exporters.kernels import autotune
from exporters.kernels.candidates import candidates
from exporters.kernels.kernel import Chain, TileConfig
from exporters.kernels.launch import launch, run
from exporters.kernels.plan import ChooseTileConfig, heuristic
from exporters.kernels.tuned import chooser
from exporters.kernels.workload import Size, attention_workload, bytes_of, draw

PUBLISHED = {"PVM, Qwen3-VL-8B": (1024, 0.30), "mixin, CoMemo-2B": (1792, 0.60)}
"""Visual tokens, and the share of a copy's bandwidth that is aimed at for one row."""


def measure_chain(
    chain: Chain, tensors: Mapping[str, Tensor], clock: Timer, choose: ChooseTileConfig = heuristic
) -> Spread:
    """Seconds of all launches, weights and memory read from the device's memory each time."""
    copies = autotune.copies_of(chain.steps, tensors, clock.l2_bytes)
    return clock.runs([partial(run, chain, copy, choose) for copy in copies])


def measure_steps(
    chain: Chain, tensors: Mapping[str, Tensor], label: str, clock: Timer, report: PartReport, choose: ChooseTileConfig
) -> None:
    values = dict(tensors)
    for step in chain.steps:
        inputs = {name: values[value] for name, value in step.inputs.items() if value in values}
        copies = autotune.copies_of((step,), values, clock.l2_bytes)
        seconds = clock.runs([partial(autotune.run_steps, (step,), copy, choose) for copy in copies])
        report.figure(f"{label}: {step.name}", scaled(seconds, 1e6), "us")
        report.figure(f"{label}: {step.name} reads", bytes_of(inputs) / seconds.median / 1e9, "GB/s")
        outputs = launch(step, inputs, choose)
        values |= {value: outputs[name] for name, value in step.outputs.items()}


def scaled(spread: Spread, factor: float) -> Spread:
    return Spread(tuple(factor * value for value in spread.values))


def share(size: int, seconds: Spread, report: PartReport) -> Spread:
    """Of the bandwidth that a copy reached in this call."""
    copy = 1e9 * report.content["ceilings"]["copy, GB/s"]
    return Spread(tuple(size / value / copy for value in seconds.values))


def measure_block(
    name: str, graft: Any, batch: int, setting: Setting, clock: Timer, report: PartReport
) -> tuple[Chain, dict[str, Tensor], Spread]:
    slots, target = PUBLISHED.get(name, (24, 0.5))
    chain, types = attention_workload(graft, Size(batch, 1, slots))
    tensors = draw(types, setting.device)
    seconds = measure_chain(chain, tensors, clock)
    size = bytes_of(tensors)
    label = f"{name}, batch {batch}"
    ceilings = report.content["ceilings"]
    floor = len(chain.steps) * ceilings["empty launch, us"] + size / ceilings["copy, GB/s"] / 1e3
    report.figure(f"{label}: weights and memory", size / 1e6, "MB")
    report.figure(f"{label}: {len(chain.steps)} launches", scaled(seconds, 1e6), "us")
    report.figure(f"{label}: of it what empty launches and a copy's bandwidth would take", floor, "us")
    if batch == 1:
        report.check(f"{label}: bandwidth / a copy's", share(size, seconds, report), ">=", target)
        measure_steps(chain, tensors, label, clock, report, heuristic)
    else:
        report.figure(f"{label}: bandwidth / a copy's", share(size, seconds, report))
    return chain, tensors, seconds


def tune_tile_configs(
    name: str, chain: Chain, tensors: dict[str, Tensor], setting: Setting, clock: Timer, report: PartReport
) -> None:
    """Measure all ways of cutting the launches, keep the best, and check that they compute the same."""
    if setting.dry:
        measurements = autotune.tune(chain, tensors, lambda runs: clock.runs(runs).median, offer=first_and_last)
    else:
        measurements = autotune.tune_on_gpu(chain, tensors)
    for launched, measurement in measurements.items():
        step = launched.split()[0]
        report.figure(f"{name}: {step}, best of {measurement.tried}", measurement.seconds * 1e6, "us")
    report.note(
        f"{name}: tile configs", {launched: asdict(measurement) for launched, measurement in measurements.items()}
    )
    tuned = chooser({launched: measurement.tile_config for launched, measurement in measurements.items()})
    (by_tuning,), (expected,) = run(chain, tensors, tuned), run(chain, tensors)
    error = relative(by_tuning, expected)
    if not error <= TOLERANCES["bfloat16"]:
        raise AssertionError(f"{name}: tuned tile configs compute something else, by {error:.3g}")
    # in turns: the clocks of a GPU drift
    turns = range(setting.pick(3, 1))
    pairs = [(measure_chain(chain, tensors, clock), measure_chain(chain, tensors, clock, tuned)) for _ in turns]
    rule, best = (Spread(tuple(itertools.chain(*(pair[i].values for pair in pairs)))) for i in (0, 1))
    report.figure(f"{name}: heuristic", scaled(rule, 1e6), "us")
    report.figure(f"{name}: tuned", scaled(best, 1e6), "us")
    report.figure(f"{name}: heuristic / tuned", ratios(rule, best))
    report.figure(f"{name}: tuned, bandwidth / a copy's", share(bytes_of(tensors), best, report))


def first_and_last(*arguments: Any) -> list[TileConfig]:
    """Few of the candidates, for a rehearsal."""
    tile_configs = candidates(*arguments)
    return [tile_configs[0], tile_configs[-1]]


@torch.inference_mode()
def main(setting: Setting, clock: Timer, report: PartReport) -> None:
    grafts = {name: real_grafts()[name] for name in PUBLISHED} if not setting.dry else odd_grafts()
    measured: dict[str, Any] = {}
    for batch in setting.pick((1, 8, 32), (1,)):
        for name, graft in grafts.items():
            block = measure_block(name, graft, batch, setting, clock, report)
            measured.setdefault(name, block)
    for name, (chain, tensors, _) in measured.items():
        tune_tile_configs(name, chain, tensors, setting, clock, report)
