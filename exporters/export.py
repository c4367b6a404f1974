"""A checkpoint as a bundle, whole: graphs and weights, and in fp16 what its activations need."""

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir
import torch

from exporters.artifact import artifact_kind
from exporters.calibration.calibrate import calibrate_float16, not_measured
from exporters.onnx.bundle import write_bundle
from exporters.onnx.manifest import NOT_ASKED, Manifest, Precision
from surgeon.dtypes import PRECISIONS
from surgeon.errors import OptionError
from surgeon.progress import Progress


def export_bundle(
    checkpoint: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | str,
    max_length: int = 4096,
    overwrite: bool = False,
    progress: Progress | None = None,
    graphs: Collection[str] | None = None,
    measure: bool = True,
    digests: bool = True,
) -> Manifest:
    """Export a plain or patched checkpoint (a directory or a hub id) to a new directory `target`; -> its manifest.

    dtype: of the graphs, torch's or fp32, fp16 or bf16. max_length: slots of the key/value caches, prompt and answer
    together. graphs: some of `exporters.onnx.bundle.GRAPHS`; by default all that the model has. `progress(stage, done,
    total)` is called as the work goes on. No weight is loaded; weights of another dtype are converted one at a time.
    measure: whether fp16 graphs are run, in fp32, to see what would overflow, and get fp32 there (docs/precision.md).
    digests: whether the weight files are read once more for their SHA-256, which `surgeon validate --bytes` compares.

    Raises OptionError for a dtype, length or graph that cannot be, CheckpointError and FamilyError for the checkpoint,
    BundleError for a model that cannot be exported, TargetError for the target. `target` appears whole or not at all.
    """
    if not isinstance(checkpoint, str | Path):
        raise OptionError(
            f"cannot export a {type(checkpoint).__name__} in memory: write it with surgeon.save, and export that"
        )
    if (kind := artifact_kind(checkpoint)) != "checkpoint":
        what = "a bundle" if kind == "bundle" else kind
        raise OptionError(f"{checkpoint} holds {what}, not a checkpoint: pass the checkpoint that it was made of")
    return write_bundle(
        checkpoint,
        Path(target),
        dtype=PRECISIONS.get(dtype, dtype) if isinstance(dtype, str) else dtype,
        max_length=max_length,
        calibrate=calibrate_float16 if measure else _unmeasured,
        overwrite=overwrite,
        progress=progress,
        graphs=graphs,
        digests=digests,
    )


def _unmeasured(directory: Path, progress: Progress | None) -> tuple[Precision, dict[str, ir.Model]]:
    return not_measured(NOT_ASKED), {}
