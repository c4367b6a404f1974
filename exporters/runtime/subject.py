"""Bundles and engines as the validator sees them, and the pair of subjects that a comparison needs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.forms import FORMS, form_of
from exporters.runtime.bundle_runtime import BundleRuntime
from exporters.runtime.runtime import Runtime
from exporters.runtime.session import Provider
from surgeon.errors import SurgeonError
from surgeon.inputs import Prompt
from surgeon.memory.patched import RECORD
from surgeon.models import graft_class
from surgeon.parity.ladder import MOVED, TUNED, Rung, rung_between
from surgeon.parity.subject import Subject, Trace
from surgeon.parity.torch_subject import TorchSubject
from surgeon.positions import Positions


class RuntimeSubject:
    """A model in one of this tool's runtimes, its numbers as that computes them: decoding through the caches, one step
    a token. `positions`: as for `Runtime.prepare`."""

    stage: str

    def __init__(self, runtime: Runtime, positions: Positions | None = None) -> None:
        self.path, self.positions, self.runtime = str(runtime.path), positions, runtime
        self.dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[runtime.manifest.dtype]
        self.record: Mapping[str, Any] | None = getattr(runtime.config, RECORD, None)

    def trace(self, prompts: Sequence[Prompt], steps: int, tokens: np.ndarray | None = None) -> Trace:
        inputs = self.runtime.prepare(prompts, self.positions)
        state, prompt_logits = self.runtime.start(inputs, logits="all")
        lengths = inputs.lengths
        logits = [np.stack([row[n - 1] for row, n in zip(prompt_logits, lengths, strict=True)])]
        fed: list[np.ndarray] = []
        for step in range(steps):
            fed.append(logits[-1].argmax(-1) if tokens is None else tokens[:, step])
            if step < steps - 1:
                logits.append(self.runtime.step(state, fed[-1]))
        return Trace(
            [row[:n] for row, n in zip(inputs.input_ids, lengths, strict=True)],
            [row[:n] for row, n in zip(prompt_logits, lengths, strict=True)],
            np.stack(logits, 1),
            np.stack(fed, 1),
        )


class BundleSubject(RuntimeSubject):
    """A bundle in ONNX Runtime."""

    stage = "bundle"

    def __init__(self, path: str | Path, positions: Positions | None = None, provider: Provider = "auto") -> None:
        super().__init__(BundleRuntime(path, provider=provider), positions)
        self.provider = provider

    def gates(self) -> dict[str, float]:
        """Every graft's gates, by parameter name: the value farthest from zero."""
        gates = {gate for entry in (self.record or {}).get("grafts", []) for gate in graft_class(entry["kind"]).gates}
        if not gates:
            return {}
        path = Path(self.path) / self.runtime.manifest.graphs["decoder"].file
        found = {}
        for name, value in ir.load(path).graph.initializers.items():
            tensor = value.const_value
            if name.rsplit(".", 1)[-1] in gates and isinstance(tensor, ir.ExternalTensor):
                # read here: onnx-ir refuses files with several hard links, which a bundle's weights may be
                file, dtype = path.parent / tensor.location, tensor.dtype.numpy()
                values = np.fromfile(file, dtype, count=tensor.size, offset=tensor.offset or 0)
                found[name] = float(np.abs(values.astype(np.float32)).max())
        return found

    def tensors(self, prompts: Sequence[Prompt]) -> dict[str, list[np.ndarray]]:
        layers = self.runtime.manifest.sizes.num_hidden_layers
        names = [f"hidden_states.{i}" for i in range(layers)]
        searching = BundleRuntime(self.path, provider=self.provider, extra_outputs=names)
        inputs = searching.prepare(prompts, self.positions)
        state, _ = searching.start(inputs)
        return {
            name: [row[:n].astype(np.float32) for row, n in zip(state.extra[name], inputs.lengths, strict=True)]
            for name in names
        }


class EngineSubject(RuntimeSubject):
    """Engines on a GPU. What is computed on the way cannot be seen."""

    stage = "engine"

    def __init__(self, path: str | Path, positions: Positions | None = None) -> None:
        from exporters.tensorrt.runtime import EngineRuntime

        super().__init__(EngineRuntime(path), positions)

    def gates(self) -> dict[str, float]:
        raise SurgeonError(
            f"{self.path} has grafts that the other has not, and engines do not show their gates: compare it with the "
            "patched checkpoint or its bundle"
        )

    def tensors(self, prompts: Sequence[Prompt]) -> None:
        return None


def open_pair(
    a: str | Path, b: str | Path, positions: Positions | None = None, provider: Provider = "auto"
) -> tuple[Subject, Subject, Rung]:
    """Load two checkpoints, bundles or directories of engines, the reference first whichever way they were named, and
    the rung between them.

    The earlier form is the reference of the later; a checkpoint then runs in fp32, whatever it is stored in. An
    unpatched checkpoint is the reference of a patched one. `positions` of both, where they offer a choice; `provider`
    of bundles. Raises SurgeonError where the two are not forms of one model, or are asked with other tokens.
    """
    if FORMS.index(form_of(a)) > FORMS.index(form_of(b)):
        a, b = b, a
    alone = form_of(b) == "checkpoint"

    def opened(path: str | Path) -> Any:
        match form_of(path):
            case "engines":
                return EngineSubject(path, positions)
            case "bundle":
                return BundleSubject(path, positions, provider)
        return TorchSubject(path, positions=positions) if alone else TorchSubject(path, "fp32", positions=positions)

    subject, reference = opened(b), opened(a)  # the later first: what cannot be run says so before anything is loaded
    if reference.stage == subject.stage and _comes_later(reference, subject):
        reference, subject = subject, reference
    _check_same_model(reference, subject)
    _check_same_prompts(reference, subject)
    moved = positions != "plain" and _scheme(reference) != _scheme(subject)
    # Whether what one has and the other has not is still exactly nothing.
    added = (_grafts(reference), _scheme(reference)) != (_grafts(subject), _scheme(subject))
    closed = added and not any(subject.gates().values())
    rung = rung_between((reference.stage, subject.stage), (reference.dtype, subject.dtype), closed)
    if added:
        rung = TUNED if not closed else MOVED if moved else rung
    return reference, subject, rung


_PRECISION = ("fp32", "fp16", "bf16")


def _comes_later(a: Subject, b: Subject) -> bool:
    """Whether `a` is the later form of the two."""

    def age(subject: Subject) -> tuple[int, bool, int]:
        return len(_grafts(subject)), _scheme(subject) is not None, _PRECISION.index(subject.dtype)

    return age(a) > age(b)


def _grafts(subject: Subject) -> list[Any]:
    return list((subject.record or {}).get("grafts", []))


def _scheme(subject: Subject) -> Any:
    """Its position ids, where they are not the family's."""
    return (subject.record or {}).get("positions")


def _check_same_prompts(a: Subject, b: Subject) -> None:
    allocations = [(subject.record or {}).get("allocation") == "memory" for subject in (a, b)]
    if allocations[0] != allocations[1]:
        raise SurgeonError(
            f"{a.path} and {b.path} cannot be compared: in one of them tiles go to the memory alone (tiles=memory), so "
            "the same pictures are other tokens; compare forms of one patched checkpoint"
        )


def _check_same_model(a: Subject, b: Subject) -> None:
    sizes = []
    for subject in (a, b):
        config = subject.model.config if isinstance(subject, TorchSubject) else subject.runtime.config  # type: ignore[attr-defined]
        text = config.get_text_config()
        sizes.append((text.num_hidden_layers, text.hidden_size, text.vocab_size))
    if sizes[0] != sizes[1]:
        names = "layers, hidden size, vocabulary"
        raise SurgeonError(f"{a.path} and {b.path} are not forms of one model ({names}): {sizes[0]} and {sizes[1]}")
