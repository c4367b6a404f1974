"""What a bundle's fp16 graphs need beyond fp16."""

from pathlib import Path

import onnx_ir as ir

from exporters.calibration.measure import LIMIT, MARGIN, Unmeasurable, exceeding, measure
from exporters.calibration.widen import WidenToFloat32
from exporters.onnx.manifest import Activation, Precision
from surgeon.progress import Progress


def calibrate_float16(directory: Path, progress: Progress | None = None) -> tuple[Precision, dict[str, ir.Model]]:
    """Measure the fp16 bundle in `directory`; -> the precision record, and the graphs that had to change, by name.

    Raises BundleError where a value would overflow that cannot be fp32, or is not finite in fp32 either.
    """
    try:
        activations, prompts = measure(directory, progress)
    except Unmeasurable as reason:
        return not_measured(str(reason)), {}
    widened = exceeding(activations)
    graphs = {}
    for name in dict.fromkeys(activation.graph for activation in widened):
        graphs[name] = ir.load(directory / f"{name}.onnx")
        WidenToFloat32([activation.value for activation in widened if activation.graph == name])(graphs[name])
    largest: dict[tuple[str, str], Activation] = {}
    for activation in activations:
        key = (activation.graph, activation.layer)
        if key not in largest or activation.max_abs > largest[key].max_abs:
            largest[key] = activation
    precision = Precision(limit=LIMIT, margin=MARGIN, prompts=prompts, largest=list(largest.values()), widened=widened)
    return precision, graphs


def not_measured(reason: str) -> Precision:
    return Precision(limit=LIMIT, margin=MARGIN, prompts=0, skipped=reason)
