"""How large a model's activations become, against what fp16 can hold: measured on the bundle's own graphs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from exporters.calibration.instrument import SUFFIX, Instrument
from exporters.onnx.formers import LONG_FORMER, QUERY_BUILDER, SHORT_FORMER
from exporters.onnx.manifest import Activation
from exporters.onnxruntime.bundle_runtime import BundleRuntime
from exporters.onnxruntime.rewrites import GroupedQueryAttention, PackedMultiHeadAttention
from exporters.onnxruntime.session import Session, SessionOptions
from exporters.runtime.state import State
from surgeon.errors import BundleError, CheckpointError
from surgeon.inputs import Prompt
from surgeon.memory.memory_tokens import KINDS, SHORT
from surgeon.parity.cases import default_cases
from surgeon.progress import Progress

LIMIT = 65504.0
"""The largest number that fp16 has."""
MARGIN = 4.0
"""Other images and prompts than those measured may make values this many times as large."""


class Unmeasurable(Exception):
    """Why a bundle could not be measured here, in words."""


def measure(directory: Path, progress: Progress | None = None) -> tuple[list[Activation], int]:
    """The largest absolute value of everything that the graphs of an fp16 bundle compute, with fp32 arithmetic, over
    the prompts and images of the validator; and over how many prompts.

    One prompt at a time is prefilled. Weights are mapped from their files and cast where they are used, so that memory
    goes to one weight in fp32, the key/value cache of one row, and activations. Raises Unmeasurable where that does not
    fit, or the bundle has no tokenizer or no room for a prompt; BundleError for a model whose values are not finite.
    """
    runtime = _MeasuringRuntime(directory)
    prompts = _prompts(runtime)
    _check_memory(runtime)
    try:
        runtime.inputs  # noqa: B018
    except CheckpointError as error:
        raise Unmeasurable(str(error)) from None
    measured = 0
    for number, prompt in enumerate(prompts):
        if progress:
            progress("measuring activations", number, len(prompts))
        inputs = runtime.prepare([prompt])
        if max(inputs.lengths) > runtime.max_length:
            continue
        state, _ = runtime.start(inputs)
        _call_for_memory(runtime, state)
        measured += 1
    if progress:
        progress("measuring activations", len(prompts), len(prompts))
    if not measured:
        raise Unmeasurable(f"no prompt of the validator fits in max_length {runtime.max_length}")
    return list(runtime.activations()), measured


def _call_for_memory(runtime: BundleRuntime, state: State) -> None:
    """Have a request of one row form memory of each kind that it can, so that the formers are measured too."""
    tokens, vismem = runtime.memory_tokens, runtime.manifest.vismem
    if tokens is None or vismem is None:
        return
    for kind in KINDS:
        blind = kind == SHORT and vismem.short_former == "vision" and not state.remembered[0].images
        room = runtime.max_length - int(state.lengths[0]) >= tokens.longest
        if room and not blind:
            runtime.step(state, np.array([tokens.invoke[kind]]))
            runtime.invoke(state, 0, kind)


def exceeding(activations: Sequence[Activation], margin: float = MARGIN) -> list[Activation]:
    """Those that fp16 would not hold with the margin."""
    return [activation for activation in activations if activation.max_abs * margin > LIMIT]


class _MeasuringSession(Session):
    """A graph that computes in fp32 and remembers how large its values became."""

    def __init__(self, path: Path, name: str) -> None:
        model = ir.load(path)
        instrument = Instrument()
        instrument(model)
        for rewrite in (GroupedQueryAttention(), PackedMultiHeadAttention()):  # in tiles, where S x Smax would be large
            rewrite(model)
        self.path, self.options, self.name = path, SessionOptions(low_memory=True), name
        self.graph_dtypes = {str(v.name): v.dtype for v in (*model.graph.inputs, *model.graph.outputs)}
        self.rewrites = {}
        self.value_origins = instrument.value_origins
        self.maxima = dict.fromkeys(self.value_origins, 0.0)
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        # a folded Cast would be an fp32 copy of a weight, and all of them together twice the model
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.add_session_config_entry("session.disable_prepacking", "1")
        settings.enable_cpu_mem_arena = False
        settings.enable_mem_pattern = False  # a plan would hold every weight's copy at once
        folder = str(path.parent.resolve())
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        proto = ir.to_proto(model).SerializeToString()
        self.session = ort.InferenceSession(proto, settings, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def execute(self, binding: ort.IOBinding) -> dict[str, ort.OrtValue]:
        """As any session; the measurements are kept here, and are not among the outputs."""
        outputs = super().execute(binding)
        for value in self.maxima:
            largest = float(outputs.pop(f"{value}{SUFFIX}").numpy())
            if not math.isfinite(largest):
                origin = self.value_origins[value]
                raise BundleError(
                    f"{origin.layer} ({origin.operator}) is not finite in fp32 either: the checkpoint's own weights "
                    "are broken, no dtype can hold its values"
                )
            self.maxima[value] = max(self.maxima[value], largest)
        return outputs


class _MeasuringRuntime(BundleRuntime):
    def __init__(self, path: Path) -> None:
        super().__init__(path, provider="cpu", low_memory=True)
        self.sessions: dict[str, _MeasuringSession] = {}

    def _session(self, name: str, extra_outputs: Sequence[str] = ()) -> Session:
        if name == "embed":
            return super()._session(name, extra_outputs)  # rows of a table that is fp16 already
        self.sessions[name] = _MeasuringSession(self.path / self.manifest.graphs[name].file, name)
        return self.sessions[name]

    def activations(self) -> Iterator[Activation]:
        """By graph, in its order."""
        for name, session in sorted(self.sessions.items(), key=lambda item: _ORDER.index(item[0])):
            for value, largest in session.maxima.items():
                origin = session.value_origins[value]
                yield Activation(graph=name, layer=origin.layer, operator=origin.operator, value=value, max_abs=largest)


_ORDER = ("vision", "memory", "decoder", QUERY_BUILDER, SHORT_FORMER, LONG_FORMER)


def _prompts(runtime: BundleRuntime) -> list[Prompt]:
    """Each prompt of the validator's cases, once."""
    formers = set() if runtime.manifest.vismem is None else {QUERY_BUILDER, SHORT_FORMER, LONG_FORMER}
    missing = {"embed", "vision", "decoder", *formers} - runtime.manifest.graphs.keys()
    if missing:
        raise Unmeasurable(f"the bundle has no {sorted(missing)[0]} graph")
    return list(dict.fromkeys(prompt for case in default_cases() for prompt in case.prompts))


def _check_memory(runtime: BundleRuntime) -> None:
    needed, free = memory_needed(runtime.path, runtime.manifest.sizes.model_dump(), runtime.max_length), _free_memory()
    if free is not None and needed > free:
        raise Unmeasurable(f"it takes about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free")


def memory_needed(directory: Path, sizes: Mapping[str, int], max_length: int) -> int:
    """An upper estimate in bytes: the largest weight in fp32, one row's cache in fp32 (past and present are one), and
    the activations of a prompt of 4,096 tokens at the width of the widest layer."""
    weights = (value for path in directory.glob("*.onnx") for value in ir.load(path).graph.initializers.values())
    largest = max((value.const_value.size for value in weights if value.const_value is not None), default=0)
    cache = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"] * max_length
    activations = min(4096, max_length) * sizes["hidden_size"] * 32
    return 4 * (largest + cache + activations)


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(available[0]) * 1024 if available else None
