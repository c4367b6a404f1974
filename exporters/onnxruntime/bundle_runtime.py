"""Run a bundle with ONNX Runtime."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime as ort
from torch import Tensor

from exporters.onnx.manifest import Manifest
from exporters.onnxruntime.custom_ops import cuda_device
from exporters.onnxruntime.session import (
    Provider,
    Session,
    SessionOptions,
    as_tensor,
    as_value,
    choose_provider,
)
from exporters.runtime.runtime import GraphName, Runtime
from exporters.runtime.state import State, Tokens, stays_on_device
from surgeon.errors import BundleError


class BundleRuntime(Runtime):
    """A bundle, ready to run. It holds weights and sessions; what belongs to a request is in its `State`."""

    def __init__(
        self,
        path: str | Path,
        *,
        provider: Provider = "auto",
        fast_attention: bool = True,
        threads: int | None = None,
        low_memory: bool = False,
        fused_kernels: bool = True,
        extra_outputs: Sequence[str] = (),
        overrides: Mapping[str, float] | None = None,
    ) -> None:
        """`threads`: of one operator; `low_memory`: map weights instead of packing them (slower); `fast_attention`:
        ONNX Runtime's own operators in place of standard Attention; `fused_kernels`: grafts by the project's kernels,
        where CUDA is the provider and they can be built; `extra_outputs`: names of values in decoder.onnx, such as
        `hidden_states.3`, that each call leaves in `State.extra`; `overrides`: parameters of decoder.onnx that hold one
        other value throughout, in memory. Sessions are created when first used.

        Raises BundleError for a bundle that is missing or damaged, and for a provider that does not work here.
        """
        manifest = Manifest.load(path)
        chosen = choose_provider(provider)
        fused = cuda_device() if fused_kernels and chosen == "cuda" and manifest.memory else None
        self.options = SessionOptions(chosen, threads, low_memory, fast_attention, fused)
        self.extra_outputs = tuple(extra_outputs)
        self.overrides = dict(overrides or {})
        super().__init__(Path(path), manifest)

    # -- sessions ----------------------------------------------------------------------------------------------
    @cached_property
    def vision(self) -> Session:
        return self._session("vision")

    @cached_property
    def embed(self) -> Session:
        return self._session("embed")

    @cached_property
    def memory(self) -> Session:
        return self._session("memory")

    @cached_property
    def decoder(self) -> Session:
        return self._session("decoder", self.extra_outputs)

    @cached_property
    def query_builder(self) -> Session:
        return self._session("query_builder")

    @cached_property
    def short_former(self) -> Session:
        return self._session("short_former")

    @cached_property
    def long_former(self) -> Session:
        return self._session("long_former")

    def _session(self, name: str, extra_outputs: Sequence[str] = ()) -> Session:
        graph_file = self.manifest.graphs.get(name)
        if graph_file is None:
            raise BundleError(f"{self.path} has no graph {name}: export it again with all of its graphs")
        overrides = self.overrides if name == "decoder" else {}
        return Session(self.path / graph_file.file, self.options, extra_outputs, graph_file, overrides)

    # -- as every runtime --------------------------------------------------------------------------------------
    @property
    def device(self) -> str:
        return self.options.device

    def takes(self, graph: GraphName) -> Collection[str]:
        session: Session = getattr(self, graph)
        return session.inputs.keys()

    def run(self, graph: GraphName, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | Tensor]:
        session: Session = getattr(self, graph)
        outputs = session.run({name: value for name, value in feeds.items() if name in session.inputs})
        return {n: as_tensor(value) if stays_on_device(n) else value.numpy() for n, value in outputs.items()}

    def zeros(self, name: str, sizes: Mapping[str, int]) -> Tensor:
        return self.decoder.zeros(name, sizes)

    def prefill(self, state: State, rows: slice, tokens: Tokens) -> np.ndarray:
        memory = {name: as_value(tensor[rows].contiguous()) for name, tensor in state.memory.items()}
        feeds = self._known(tokens.feeds() | {"memory_mask": self.memory_mask(state, rows, tokens)})
        return self._read(state, self.decoder.execute(self._bind(feeds | memory, state, rows)))

    def decode(self, state: State, changing: dict[str, np.ndarray], fixed: dict[str, np.ndarray]) -> np.ndarray:
        binding = state.bound()
        if binding is None:
            memory = {name: as_value(tensor.contiguous()) for name, tensor in state.memory.items()}
            binding = state.bind(self._bind(self._known(changing | fixed) | memory, state, slice(None)))
        else:
            self.decoder.bind_inputs(binding, changing)
            own = [_LAST_HIDDEN_STATE] if _LAST_HIDDEN_STATE in self.decoder.outputs else []
            for name in ("logits", *own, *self.extra_outputs):
                self.decoder.bind_new_output(binding, name)
        return self._read(state, self.decoder.execute(binding))

    # -- inside ------------------------------------------------------------------------------------------------
    def _bind(self, feeds: dict[str, np.ndarray | ort.OrtValue], state: State, rows: slice) -> ort.IOBinding:
        """With past and present of the caches in the same place."""
        caches = {name: as_value(tensor[rows]) for name, tensor in state.caches.items()}
        present = {name.replace("past_", "present_"): value for name, value in caches.items()}
        return self.decoder.bind(feeds | caches, present)

    def _known(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray | ort.OrtValue]:
        """Those that the decoder takes: what a model's grafts do not read is not among its inputs."""
        return {name: value for name, value in feeds.items() if name in self.decoder.inputs}

    def _read(self, state: State, outputs: dict[str, ort.OrtValue]) -> np.ndarray:
        state.extra = {name: outputs[name].numpy() for name in self.extra_outputs}
        if _LAST_HIDDEN_STATE in outputs:
            state.last_hidden_state = outputs[_LAST_HIDDEN_STATE].numpy()
        logits: np.ndarray = outputs["logits"].numpy()
        return logits


_LAST_HIDDEN_STATE = "last_hidden_state"
