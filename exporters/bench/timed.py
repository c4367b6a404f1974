"""How each form of a model is run for a measurement: the whole prompt, then greedy tokens one by one."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from exporters.artifact import artifact_kind
from surgeon import models
from surgeon.dtypes import name_of
from surgeon.inputs import Inputs, Prompt
from surgeon.positions import record_of

if TYPE_CHECKING:
    from exporters.onnxruntime.session import Provider
    from exporters.runtime import Runtime


class Timed(ABC):
    """One form of a model, loaded, with a batch of prompts."""

    stage: str
    """What it is: checkpoint, bundle, engine."""
    dtype: str
    device: str

    @abstractmethod
    def run(self, steps: int) -> list[float]:
        """Answer the prompts with `steps` tokens each -> the time of each token's end, in seconds from the beginning;
        the first includes images and prompt."""

    @property
    @abstractmethod
    def prompt_tokens(self) -> int:
        """Of the longest row."""

    def device_memory(self) -> int:
        """Peak bytes on the device, 0 on a CPU."""
        return int(torch.cuda.max_memory_allocated()) if self.device == "cuda" else 0


class TimedCheckpoint(Timed):
    """A checkpoint, by transformers' `generate`."""

    stage = "checkpoint"

    def __init__(self, path: Path, prompts: Sequence[Prompt], threads: int | None, provider: "Provider") -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = models.load(path, device=self.device)
        self.dtype = name_of(self.model.dtype)
        self.inputs = Inputs.from_directory(path)
        self.prepared = self.inputs.prepare(prompts)

    @property
    def prompt_tokens(self) -> int:
        return int(self.prepared.lengths.max())

    def run(self, steps: int) -> list[float]:
        clock = _Clock(self.device)
        settings = GenerationConfig(
            max_new_tokens=steps, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=self.inputs.pad_token_id
        )
        # every form is timed without memory that a model calls for: as many steps in each
        quiet = {"memory": "off"} if record_of(self.model.config).get("vismem") else {}
        self.model.generate(
            **quiet,
            **self.prepared.model_kwargs(self.model.dtype, self.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([clock]),
        )
        return clock.ends


class _Clock(LogitsProcessor):
    """Notes when logits arrive."""

    def __init__(self, device: str) -> None:
        self.device, self.begin, self.ends = device, time.perf_counter(), []  # type: ignore[var-annotated]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() - self.begin)
        return scores


class TimedRuntime(Timed):
    """A model in one of this tool's runtimes."""

    def __init__(self, runtime: "Runtime", prompts: Sequence[Prompt]) -> None:
        self.runtime = runtime
        self.device, self.dtype = runtime.device, runtime.manifest.dtype
        self.prepared = runtime.prepare(prompts)

    @property
    def prompt_tokens(self) -> int:
        return int(self.prepared.lengths.max())

    def run(self, steps: int) -> list[float]:
        begin, ends = time.perf_counter(), []
        state, logits = self.runtime.start(self.prepared)
        for _ in range(steps):
            tokens: np.ndarray = logits.argmax(-1)
            ends.append(time.perf_counter() - begin)
            if len(ends) < steps:
                logits = self.runtime.step(state, tokens)
        return ends


class TimedBundle(TimedRuntime):
    """A bundle, by ONNX Runtime."""

    stage = "bundle"

    def __init__(self, path: Path, prompts: Sequence[Prompt], threads: int | None, provider: "Provider") -> None:
        from exporters.onnxruntime import BundleRuntime

        super().__init__(BundleRuntime(path, provider=provider, threads=threads), prompts)


class TimedEngine(TimedRuntime):
    """Engines, by TensorRT. `threads` means nothing to them."""

    stage = "engine"

    def __init__(self, path: Path, prompts: Sequence[Prompt], threads: int | None, provider: "Provider") -> None:
        from exporters.tensorrt.runtime import EngineRuntime

        self.engines = EngineRuntime(path)
        super().__init__(self.engines, prompts)

    def device_memory(self) -> int:
        """What torch holds, and the engines, which TensorRT loads beside it; without its working memory."""
        return super().device_memory() + sum(engine.bytes for engine in self.engines.engines.engines.values())


_TIMED: dict[str, Callable[[Path, Sequence[Prompt], int | None, "Provider"], Timed]] = {
    "checkpoint": TimedCheckpoint,
    "bundle": TimedBundle,
    "engines": TimedEngine,
}


def open_timed(
    path: Path, prompts: Sequence[Prompt], threads: int | None = None, provider: "Provider" = "auto"
) -> Timed:
    """The runner of what `path` is. Raises SurgeonError kinds where it cannot be run."""
    return _TIMED[artifact_kind(path)](path, prompts, threads, provider)
