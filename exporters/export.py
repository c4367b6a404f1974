"""A checkpoint as a bundle, whole: graphs and weights, and in fp16 what its activations need."""

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir
import torch

from exporters.calibration.calibrate import calibrate_float16, not_measured
from exporters.onnx.bundle import write_bundle
from exporters.onnx.manifest import NOT_ASKED, Manifest, Precision
from surgeon.progress import Progress


def export_bundle(
    checkpoint: str | Path,
    target: Path,
    *,
    dtype: torch.dtype,
    max_length: int,
    overwrite: bool = False,
    progress: Progress | None = None,
    graphs: Collection[str] | None = None,
    measure: bool = True,
    digests: bool = True,
) -> Manifest:
    """Export a plain or patched checkpoint (a directory or a hub id) to a new directory `target`; -> its manifest.

    dtype: of the graphs, float32, float16 or bfloat16. max_length: slots of the key/value caches, prompt and answer
    together. graphs: some of `exporters.onnx.bundle.GRAPHS`; by default all that the model has. `progress(stage, done,
    total)` is called as the work goes on. No weight is loaded; weights of another dtype are converted one at a time.
    measure: whether fp16 graphs are run, in fp32, to see what would overflow, and get fp32 there (docs/precision.md).
    digests: whether the weight files are read once more for their SHA-256, which `surgeon validate --bytes` compares.

    Raises OptionError for a dtype, length or graph that cannot be, CheckpointError and FamilyError for the checkpoint,
    BundleError for a model that cannot be exported, TargetError for the target. `target` appears whole or not at all.
    """
    return write_bundle(
        checkpoint,
        target,
        dtype=dtype,
        max_length=max_length,
        calibrate=calibrate_float16 if measure else _unmeasured,
        overwrite=overwrite,
        progress=progress,
        graphs=graphs,
        digests=digests,
    )


def _unmeasured(directory: Path, progress: Progress | None) -> tuple[Precision, dict[str, ir.Model]]:
    return not_measured(NOT_ASKED), {}
