"""Part 1: every kernel, and every chain of kernels, against its definition in fp32."""

import math
import multiprocessing
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.grafts import odd_grafts, real_grafts
from benchmarks.gpu_check.part import PartReport, Setting
from benchmarks.gpu_check.timing import Timer
from exporters.kernels.kernel import Chain
from exporters.kernels.launch import launch, run
from exporters.kernels.workload import Size, attention_workload, draw, memory_workload
from surgeon.memory.graft import Graft
from surgeon.memory.reference import Reference, argument_names
from surgeon.memory.visibility import causally

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Of the norm of what is wrong to the norm of what is right."""


@dataclass(frozen=True)
class Finding:
    what: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # NaN is not


def sizes(dtype: str, dry: bool, odd: bool) -> list[Size]:
    """Decoding, prefill, ragged images, a mask per token, an image's own tokens."""
    if dry:
        shapes = [
            Size(1, 1, 40),
            Size(2, 1, 24, mask_per_token=True),
            Size(2, 19, 33, mask_per_token=True, visual_tokens=True),
        ]
    else:
        shapes = [
            Size(1, 1, 1024),
            Size(1, 1, 1792),
            Size(3, 1, 700),
            Size(8, 1, 1024),
            Size(32, 1, 1792),
            Size(1, 512, 1024, visual_tokens=True),
            Size(2, 333, 700),
            Size(3, 37, 257, mask_per_token=True),
            Size(3, 1, 700, mask_per_token=True),
            Size(1, 512, 1024, mask_per_token=True, visual_tokens=True),
        ]
        if odd:
            shapes += [Size(5, 1, 1), Size(1, 4, 3), Size(2, 100, 65, mask_per_token=True, visual_tokens=True)]
    return [Size(s.batch, s.length, s.slots, dtype, s.mask_per_token, s.visual_tokens) for s in shapes]


def relative(actual: Tensor, expected: Tensor) -> float:
    """The relative error; NaN where `actual` has another shape, or a value that is not finite."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return math.nan
    scale = float(expected.double().norm())
    return float((actual.double() - expected.double()).norm()) / (scale or 1.0)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN: what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def settled(acc: Tensor, ml: Tensor) -> tuple[Tensor, Tensor]:
    """What `attend` read, whatever its splits: the weighted values, and the logarithm of the sum of the weights."""
    m = ml[..., 0].amax(-1, keepdim=True)
    weights = (ml[..., 0] - m).exp()
    total = (weights * ml[..., 1]).sum(-1)
    values = (weights[..., None] * acc).sum(-2) / torch.where(total == 0, 1.0, total)[..., None]
    return values, torch.where(total == 0, 0.0, m[..., 0] + total.clamp_min(1e-30).log())


def ragged(inputs: dict[str, Tensor], size: Size) -> Tensor:
    """Images of different lengths, none for the last row of several, holes; a mask per token is causal, and some
    tokens see nothing -> which tokens see a slot, [B, S]."""
    generator = torch.Generator(inputs["memory_mask"].device).manual_seed(1)
    mask = inputs["memory_mask"]
    mask &= torch.rand(mask.shape, generator=generator, device=mask.device) < 0.9
    if size.batch > 1:
        mask[-1] = False
        mask[0, ..., size.slots // 2 :] = False
    if size.mask_per_token and size.length > 1:  # a token that is generated sees all that was before
        tokens = torch.arange(size.length, device=mask.device)
        places = torch.arange(size.slots, device=mask.device) * size.length // size.slots
        mask &= causally(mask, places.expand(size.batch, -1), tokens)
        mask[:, :: max(2, size.length // 4)] = False
    if "visual_token_mask" in inputs:
        inputs["visual_token_mask"][:, 1 : size.length // 2] = True
    seen = mask.any(-1)
    return seen if size.mask_per_token else seen[:, None].expand(-1, size.length)


def check_steps(chain: Chain, tensors: Mapping[str, Tensor], tolerance: float, label: str) -> Iterator[Finding]:
    """Each kernel on the outputs of the kernels before it."""
    values = dict(tensors)
    for step in chain.steps:
        inputs = {name: values[value] for name, value in step.inputs.items() if value in values}
        with sdpa_kernel(SDPBackend.MATH):
            expected = step.kernel.definition(*(inputs.get(name) for name in step.kernel.inputs), **step.options)
        with poisoned():
            outputs = launch(step, inputs)
        pairs = dict(zip(outputs, zip(outputs.values(), expected, strict=False), strict=True))
        if step.kernel.name == "attend":
            actual = settled(outputs["acc"], outputs["ml"])
            reference = settled(*expected[:2])
            pairs = {
                "values": (actual[0], reference[0]),
                "weights": (actual[1], reference[1]),
                "arrived": pairs["arrived"],
            }
        for name, (one, other) in pairs.items():
            yield Finding(f"{step.name}: {name}, {label}", relative(one, other), tolerance)
        values |= {value: outputs[name] for name, value in step.outputs.items()}


def in_fp32(graft: Graft, reference: Reference, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of a reference implementation, floating-point ones in fp32."""
    arguments: dict[str, Any] = dict.fromkeys(argument_names(reference)) | dict(tensors) | {"eps": graft.eps}
    return {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def check_reading(graft: Graft, size: Size, device: str, label: str) -> Iterator[Finding]:
    chain, types = attention_workload(graft, size)
    inputs = draw(types, device, seed=2)
    seen = ragged(inputs, size)
    tolerance = TOLERANCES[size.dtype]
    yield from check_steps(chain, inputs, tolerance, label)

    assert graft.reference is not None
    with sdpa_kernel(SDPBackend.MATH):
        expected = graft.reference(**in_fp32(graft, graft.reference, inputs))
    base = inputs.get("residual", inputs["hidden_states"])
    with poisoned():
        (output,) = run(chain, inputs)
    yield Finding(f"{chain.name}, {label}", relative(output, expected), tolerance)
    untouched = ~seen | inputs["visual_token_mask"] if "visual_token_mask" in inputs else ~seen
    changed = float((output[untouched] != base[untouched]).sum())
    yield Finding(f"{chain.name}: elements changed of tokens that get no memory, {label}", changed, 0.0)


def check_filling(graft: Graft, size: Size, device: str, label: str) -> Iterator[Finding]:
    chain, types = memory_workload(graft, size)
    inputs = draw(types, device, seed=3)
    tolerance = TOLERANCES[size.dtype]
    yield from check_steps(chain, inputs, tolerance, label)
    assert graft.memory_reference is not None
    expected = graft.memory_reference(**in_fp32(graft, graft.memory_reference, inputs))
    with poisoned():
        outputs = run(chain, inputs)
    for name, one, other in zip(chain.outputs, outputs, expected, strict=True):
        yield Finding(f"{chain.name}: {name}, {label}", relative(one, other), tolerance)


def check(name: str, dtype: str, dry: bool) -> list[Finding]:
    """All of one graft in one dtype; the work of one process, because a kernel that reads outside its tensors ends all
    that its process does on the GPU."""
    torch.set_float32_matmul_precision("highest")
    graft = (real_grafts() | odd_grafts())[name]
    device = "cpu" if dry else "cuda"
    findings: list[Finding] = []
    with torch.inference_mode():
        for size in sizes(dtype, dry, name in odd_grafts()):
            label = f"{name}, {size}"
            findings += check_reading(graft, size, device, label)
            if size.length == 1:
                findings += check_filling(graft, size, device, label)
    return findings


def badness(finding: Finding) -> float:
    return math.inf if math.isnan(finding.error) else finding.error / (finding.tolerance or 1e-9)


def main(setting: Setting, clock: Timer, report: PartReport) -> None:
    dtypes = setting.pick(tuple(TOLERANCES), ("float32", "bfloat16"))
    names = odd_grafts() if setting.dry else real_grafts() | odd_grafts()
    cases = [(name, dtype) for dtype in dtypes for name in names]
    failures: list[str] = []
    workers = setting.pick(12, 2)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=setting.pick(1, None)) as pool:
        started = {pool.submit(check, name, dtype, setting.dry): (name, dtype) for name, dtype in cases}
        for future in as_completed(started):
            label = ", ".join(started[future])
            error = future.exception()
            if error is not None:
                failures.append(f"{label}:\n{''.join(traceback.format_exception(error))}")
                print(f"  FAILED {label}: {error}", flush=True)
                continue
            findings = future.result()
            worst = max(findings, key=badness)
            wrong = [finding for finding in findings if not finding.ok]
            failures += [f"{finding.what}: {finding.error:.3g}, tolerance {finding.tolerance:g}" for finding in wrong]
            print(f"  {label}: {len(findings)} compared, {len(wrong)} wrong", flush=True)
            report.figure(f"{label}: worst of {len(findings)}", worst.error, f"({worst.what})")
    if failures:
        raise AssertionError("\n".join(failures))
