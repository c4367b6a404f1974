"""Run a directory of engines, as a bundle is run."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from exporters.fusion import NAMESPACE
from exporters.runtime.runtime import GraphName, Runtime
from exporters.runtime.state import State, Tokens, stays_on_device
from exporters.tensorrt.device import CudaDevice, Device
from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.library import gpu
from exporters.tensorrt.manifest import EngineManifest
from exporters.tensorrt.session import EngineSession

ALIGNMENT = 256
"""Of what is bound, in bytes; what torch allocates has it, a row of that need not."""


class EngineRuntime(Runtime):
    """Engines, ready to run on this machine's GPU. Decoding steps are captured as CUDA graphs."""

    def __init__(self, path: str | Path, *, device: Device | None = None, verify: bool = True) -> None:
        """`device`: where engines run, if not on the GPU that is here; `verify`: compare the files' digests.

        Raises EngineError for what is no directory of engines, or a damaged one, for engines of another version of
        the library or for another GPU, and where there is none. Engines are loaded when first used.
        """
        path = Path(path)
        self.engines = EngineManifest.load(path, verify)
        if device is None:
            check_runnable(path, self.engines)
        self._device = device or CudaDevice(self.engines.library.backend)
        self._device.register(self.engines.plugins)
        self._sessions: dict[str, EngineSession] = {}
        super().__init__(path, self.engines.bundle)

    def session(self, graph: GraphName) -> EngineSession:
        """Raises EngineError where the engine was left out of the directory, or cannot be loaded."""
        if graph not in self._sessions:
            engine_file = self.engines.engines.get(graph)
            if engine_file is None:
                raise EngineError(f"{self.path} has no engine of {graph}: build it without --graph, which left it out")
            self._sessions[graph] = EngineSession(self.path / engine_file.file, engine_file, self._device)
        return self._sessions[graph]

    # -- as every runtime --------------------------------------------------------------------------------------
    @property
    def device(self) -> str:
        return self._device.torch_device

    def takes(self, graph: GraphName) -> Collection[str]:
        return self.session(graph).inputs.keys()

    def run(self, graph: GraphName, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | Tensor]:
        session = self.session(graph)
        if graph != "embed":
            return _for_host(session.run(feeds))
        (ids,) = feeds.values()
        _, longest = session.size_range("S")
        parts = [session.run({"input_ids": ids[:, i : i + longest]}) for i in range(0, ids.shape[1], longest)]
        return {"inputs_embeds": np.concatenate([_to_host(part["inputs_embeds"]) for part in parts], axis=1)}

    def zeros(self, name: str, sizes: Mapping[str, int]) -> Tensor:
        return self.session("decoder").zeros(name, sizes)

    def prefill(self, state: State, rows: slice, tokens: Tokens) -> np.ndarray:
        """In pieces where the prompt is longer than the engine takes at once, or more logits are wanted than it gives
        at once."""
        batch, length = tokens.inputs_embeds.shape[:2]
        logits_indices = tokens.logits_indices
        states = []
        all_logits = np.zeros((batch, logits_indices.shape[1], self.manifest.sizes.vocab_size), dtype=np.float32)
        for begin, end in self._pieces(length, logits_indices.shape[1]):
            inside = (logits_indices >= begin) & (logits_indices < end)
            # a piece that gives no row's logits is asked for one all the same
            columns = np.flatnonzero(inside.any(0)) if inside.any() else np.array([0])
            indices = np.clip(logits_indices[:, columns] - begin, 0, end - begin - 1)
            logits = self._forward(state, rows, tokens.columns(begin, end, indices))
            all_logits[:, columns] = np.where(inside[:, columns, None], logits, all_logits[:, columns])
            states.append(state.last_hidden_state)
        if states[0] is not None:
            state.last_hidden_state = np.concatenate([part for part in states if part is not None], axis=1)
        return all_logits

    def decode(self, state: State, changing: dict[str, np.ndarray], fixed: dict[str, np.ndarray]) -> np.ndarray:
        step = state.bound()
        if step is None:
            feeds = changing | fixed | state.memory | state.caches
            step = state.bind(self.session("decoder").repeated(feeds, _present(state.caches)))
        return self._read(state, step(changing))

    def check_memory(self, slots: int) -> None:
        session = self.session("decoder")
        if any(name.startswith("memory_keys.") for name in session.inputs):
            _, most = session.size_range("M")
            if slots > most:
                raise EngineError(
                    f"the request's images have {slots} visual tokens in a row, the engines' memory holds {most}: "
                    f"send fewer or smaller ones, or build the engines again with --visual-tokens 1..{slots}"
                )

    # -- inside ------------------------------------------------------------------------------------------------
    def _pieces(self, length: int, logits: int) -> Iterator[tuple[int, int]]:
        session = self.session("decoder")
        smallest, largest = session.size_range("S")
        if logits > 1:
            largest = min(largest, session.size_range("T")[1])
        begin = 0
        while begin < length:
            count = min(largest, length - begin)
            end = begin + (count if count >= smallest else 1)  # too few for a prefill: one by one, as in decoding
            yield begin, end
            begin = end

    def _forward(self, state: State, rows: slice, tokens: Tokens) -> np.ndarray:
        places = {name: tensor[rows] for name, tensor in state.caches.items()}
        caches = {name: _aligned(tensor) for name, tensor in places.items()}
        memory = {name: _aligned(tensor[rows].contiguous()) for name, tensor in state.memory.items()}
        feeds = tokens.feeds() | {"memory_mask": self.memory_mask(state, rows, tokens)}
        outputs = self.session("decoder").run(feeds | memory | caches, _present(caches))
        for name, place in places.items():
            if caches[name] is not place:
                place.copy_(caches[name])
        return self._read(state, outputs)

    def _read(self, state: State, outputs: Mapping[str, Tensor]) -> np.ndarray:
        if "last_hidden_state" in outputs:
            state.last_hidden_state = _to_host(outputs["last_hidden_state"])
        return _to_host(outputs["logits"])


def check_runnable(path: Path, manifest: EngineManifest) -> None:
    """Raise EngineError where engines cannot be run on this machine, and say what can be checked of them here."""
    if foreign := [name for name in manifest.plugins if not name.startswith(f"{NAMESPACE}::")]:
        raise EngineError(f"{path} needs the plugins {', '.join(foreign)}, which this version has not; update")
    try:
        manifest.check_library()
        manifest.check_gpu(gpu())
    except EngineError as error:
        raise EngineError(
            f"{path}: nothing was run, so neither numbers nor speed are known: {error}. What can be checked here: the "
            "graphs that the engines were built from, with `surgeon validate CKPT BUNDLE`, and which operators became "
            f"fused kernels, with `surgeon inspect {path}`"
        ) from error


def _aligned(tensor: Tensor) -> Tensor:
    """The same tensor, or where it lies within another at an odd place, a copy."""
    return tensor if tensor.storage_offset() * tensor.itemsize % ALIGNMENT == 0 else tensor.clone()


def _present(caches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Caches are written where they are read."""
    return {name.replace("past_", "present_"): tensor for name, tensor in caches.items()}


def _for_host(outputs: Mapping[str, Tensor]) -> dict[str, np.ndarray | Tensor]:
    return {name: value if stays_on_device(name) else _to_host(value) for name, value in outputs.items()}


def _to_host(tensor: Tensor) -> np.ndarray:
    floating = tensor.float() if tensor.is_floating_point() else tensor
    array: np.ndarray = floating.to("cpu", copy=True).numpy()
    return array
