"""Part 6: do engines that were built without a GPU run on this one, and does ONNX Runtime's CUDA provider."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._measure import ROOT
from benchmarks.gpu_check.part import PartReport, Setting, Skipped
from benchmarks.gpu_check.timing import Timer
from exporters.kernels.support import SWITCH

DEMO = ROOT / "examples" / "demo" / "qwen3-vl-tiny"
RECIPE = "pvm:layers=2,4,6,latent=64"
_LEFT_OUT = ("no fused kernel", "standard operators stay")
"""In the output where fused kernels were left out."""


def surgeon(*arguments: str, kernels: str = "fused") -> str:
    """The command line, from the tree -> what it printed. `kernels`: what torch and ONNX Runtime compute grafts with on
    a GPU. Raises RuntimeError with all of it where it fails, and where fused kernels were left out."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment[SWITCH] = kernels
    command = [sys.executable, "-m", "cli", *arguments]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"surgeon {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
    if kernels == "fused" and any(phrase in done.stdout for phrase in _LEFT_OUT):
        raise RuntimeError(f"surgeon {' '.join(arguments)} left fused kernels out:\n{done.stdout}")
    return done.stdout


def missing(*modules: str) -> str | None:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed here: {', '.join(absent)}" if absent else None


def provider_missing() -> str | None:
    if reason := missing("onnxruntime"):
        return reason
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" in providers:
        return None
    return f"onnxruntime has no CUDA provider here, only {', '.join(providers)}"


def verdict(
    work: Path, bundle_or_engine: str, *options: str, steps: int = 16, kernels: str = "fused"
) -> dict[str, Any]:
    """`surgeon validate` against the patched checkpoint."""
    report = work / "verdict.json"
    surgeon("validate", str(work / "patched"), str(work / bundle_or_engine), "--steps", str(steps), "--overwrite",
            "--report", str(report), *options, kernels=kernels)  # fmt: skip
    content: dict[str, Any] = json.loads(report.read_text())
    return content


def rtx(work: Path, target: str, kernels: str, setting: Setting, clock: Timer, report: PartReport) -> None:
    """Build, and where there is a GPU load, run, and hold against the checkpoint and the bundle."""
    engines = work / f"engines-{target}-{kernels}"
    command = ["engine", str(work / "bundle"), str(engines), "--backend", "tensorrt-rtx", "--target", target]
    command += ["--kernels", kernels, "--prefill", "1..512", "--batch", "1..2"]
    if setting.dry:
        surgeon(*command, "--graph", "decoder", *["--dry-run"] * (kernels == "standard"))
        return
    label = f"RTX engine for {target}, {kernels} kernels"
    report.figure(f"{label}: built in", clock.wall(lambda: surgeon(*command)), "s")
    report.note(f"{label}: verdict", verdict(work, engines.name))
    report.note(f"{label}: speed", surgeon("bench", str(work / "bundle"), str(engines), "--json"))


def cuda(work: Path, kernels: str, setting: Setting, report: PartReport) -> None:
    """The bundle on ONNX Runtime's CUDA provider, held against the checkpoint."""
    if setting.dry:
        verdict(work, "bundle", "--backend", "ort-cpu", "--prompt", "A red square.", steps=2, kernels=kernels)
        return
    label, bundle = f"ONNX Runtime, CUDA, {kernels} kernels", str(work / "bundle")
    report.note(f"{label}: verdict", verdict(work, "bundle", "--backend", "ort-cuda", kernels=kernels))
    report.note(f"{label}: speed", surgeon("bench", bundle, "--backend", "ort-cuda", "--json", kernels=kernels))


def main(setting: Setting, clock: Timer, report: PartReport) -> None:
    absent = missing("pydantic", "click", "rich", "onnx_ir", "onnxscript")
    if absent:
        raise Skipped(f"{absent}; bundles are exported with these")
    native = setting.pick("native", "sm89")
    jobs: dict[str, tuple[str | None, Callable[[Path], object]]] = {
        f"RTX engine, {target}, {kernels} kernels": (
            missing("tensorrt_rtx"),
            partial(rtx, target=target, kernels=kernels, setting=setting, clock=clock, report=report),
        )
        for target in (native, "sm80")
        for kernels in ("standard", "fused")
        if not setting.dry or (target, kernels) in (("sm80", "standard"), ("sm89", "fused"))
    }
    for kernels in ("standard", "fused"):
        run = partial(cuda, kernels=kernels, setting=setting, report=report)
        jobs[f"ONNX Runtime, CUDA, {kernels} kernels"] = (provider_missing(), run)
    failures = []
    with tempfile.TemporaryDirectory(prefix="surgeon-gpu-check-") as name:
        work = Path(name)
        if setting.dry or not all(reason for reason, _ in jobs.values()):
            surgeon("patch", str(DEMO), str(work / "patched"), "--pass", RECIPE)
            surgeon("export", str(work / "patched"), str(work / "bundle"), "--dtype", "bf16", "--max-length", "1024")
        for label, (reason, job) in jobs.items():
            if reason and not setting.dry:
                print(f"  SKIPPED {label}: {reason}")
                report.note(f"{label}: skipped", reason)
                continue
            try:
                job(work)
                print(f"  {label}: ran{' as far as it can without a GPU' * setting.dry}", flush=True)
            except RuntimeError as error:
                failures.append(f"{label}: {error}")
    if failures:
        raise AssertionError("\n".join(failures))
