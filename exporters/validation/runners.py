"""Bundles and engines as the validator sees them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph_file import read_graph
from exporters.onnxruntime.bundle_runtime import BundleRuntime
from exporters.onnxruntime.session import Provider
from exporters.runtime.runtime import Runtime
from surgeon.errors import BundleError
from surgeon.generation import Generation
from surgeon.grafts import graft_class
from surgeon.inputs import Inputs, Prompt
from surgeon.memory.patched import RECORD
from surgeon.memory_use import Mode
from surgeon.parity.invocations import CalledTrace, Schedule
from surgeon.parity.runner import Trace
from surgeon.positions import Positions


class RuntimeRunner:
    """A model in one of this tool's runtimes, its numbers as that computes them: decoding through the caches, one step
    a token. `positions`: as for `Runtime.prepare`."""

    stage: str

    def __init__(self, runtime: Runtime, positions: Positions | None = None) -> None:
        self.path, self.positions, self.runtime = str(runtime.path), positions, runtime
        self.dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[runtime.manifest.dtype]
        self.record: Mapping[str, Any] | None = getattr(runtime.config, RECORD, None)

    @property
    def inputs(self) -> Inputs:
        return self.runtime.inputs

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

    def called_trace(
        self, prompts: Sequence[Prompt], steps: int, schedule: Schedule, tokens: np.ndarray | None = None
    ) -> CalledTrace:
        memory_tokens = self.runtime.memory_tokens
        assert memory_tokens is not None
        state, logits = self.runtime.start(self.runtime.prepare(prompts, self.positions))
        invoke = list(memory_tokens.invoke.values())
        step_logits, fed = [], []
        for step in range(steps):
            for row, wanted in enumerate(schedule):
                if step in wanted:
                    only = np.arange(len(schedule)) == row
                    self.runtime.step(state, np.full(len(schedule), memory_tokens.invoke[wanted[step]]), only)
                    logits[row] = self.runtime.invoke(state, row, wanted[step])
            step_logits.append(logits)
            greedy = logits.copy()
            greedy[:, invoke] = -np.inf
            fed.append(greedy.argmax(-1) if tokens is None else tokens[:, step])
            if step < steps - 1:
                logits = self.runtime.step(state, fed[-1])
        return CalledTrace(np.stack(step_logits, 1), np.stack(fed, 1))

    def answers(self, prompts: Sequence[Prompt], steps: int, mode: Mode) -> list[Generation]:
        return self.runtime.generate(prompts, steps, positions=self.positions, memory=mode)


class BundleRunner(RuntimeRunner):
    """A bundle in ONNX Runtime."""

    stage = "bundle"

    def __init__(self, path: str | Path, positions: Positions | None = None, provider: Provider = "auto") -> None:
        super().__init__(BundleRuntime(path, provider=provider), positions)
        self.provider = provider
        self._gates: Mapping[str, float] = {}

    def gates(self) -> dict[str, float]:
        """Every graft's gates, by parameter name: the value farthest from zero."""
        entries = (self.record or {}).get("grafts", [])
        gates = {gate for entry in entries for gate in graft_class(entry["kind"]).gates}
        if not gates:
            return {}
        path = Path(self.path) / self.runtime.manifest.graphs["decoder"].file
        values = {
            name: float(np.abs(_values(value.const_value, path.parent)).max())
            for name, value in read_graph(path).graph.initializers.items()
            if name.rsplit(".", 1)[-1] in gates and value.const_value is not None
        }
        expected = sum(len(entry["layers"]) * len(graft_class(entry["kind"]).gates) for entry in entries)
        if len(values) != expected:
            raise BundleError(
                f"{path} has {len(values)} gates, its config records grafts with {expected}: export the bundle again"
            )
        return values

    @contextmanager
    def with_gates(self, values: Mapping[str, float]) -> Iterator[None]:
        own_gates = self.gates()
        before, changed = self._gates, {name: value for name, value in values.items() if name in own_gates}
        self._use(changed)
        try:
            yield
        finally:
            self._use(before)

    def _use(self, gates: Mapping[str, float]) -> None:
        """Go on with these gates. Sessions that have others are let go first: two decoders are twice the memory."""
        if gates != self._gates:
            self._gates = gates
            self.runtime = self._opened()

    def _opened(self, extra_outputs: Sequence[str] = ()) -> BundleRuntime:
        return BundleRuntime(self.path, provider=self.provider, extra_outputs=extra_outputs, overrides=self._gates)

    def tensors(self, prompts: Sequence[Prompt]) -> dict[str, list[np.ndarray]]:
        layers = self.runtime.manifest.sizes.num_hidden_layers
        names = [f"hidden_states.{i}" for i in range(layers)]
        searching = self._opened(names)
        inputs = searching.prepare(prompts, self.positions)
        state, _ = searching.start(inputs)
        return {
            name: [row[:n].astype(np.float32) for row, n in zip(state.extra[name], inputs.lengths, strict=True)]
            for name in names
        }


class EngineRunner(RuntimeRunner):
    """Engines on a GPU. What is computed on the way cannot be seen."""

    stage = "engine"

    def __init__(self, path: str | Path, positions: Positions | None = None) -> None:
        from exporters.tensorrt.runtime import EngineRuntime

        super().__init__(EngineRuntime(path), positions)

    def gates(self) -> None:
        return None

    @contextmanager
    def with_gates(self, values: Mapping[str, float]) -> Iterator[None]:
        """Raises ValueError for any value: what is built into an engine cannot be changed."""
        if values:
            raise ValueError(f"the gates of engines are as they were built: {', '.join(values)}")
        yield

    def tensors(self, prompts: Sequence[Prompt]) -> None:
        return None


def _values(tensor: ir.TensorProtocol, folder: Path) -> np.ndarray:
    """A tensor's values, fp32. External ones are read here: onnx-ir refuses files with several hard links, which a
    bundle's weights may be."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy().astype(np.float32)
    file, dtype = folder / tensor.location, tensor.dtype.numpy()
    return np.fromfile(file, dtype, count=tensor.size, offset=tensor.offset or 0).astype(np.float32)
