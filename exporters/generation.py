"""Text from any form of a model, behind one interface."""

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from exporters.artifact import artifact_kind
from exporters.onnxruntime.session import Provider
from surgeon.errors import OptionError
from surgeon.generation import Generation, OnText, Sampling
from surgeon.images import ImageSource
from surgeon.inputs import Message, Prompt
from surgeon.memory_use import Mode
from surgeon.positions import Positions


class TextGenerator(Protocol):
    """What answers prompts: a checkpoint, a bundle or engines, loaded."""

    def generate(
        self,
        prompts: Sequence[Prompt | list[Message]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        on_text: OnText | None = None,
        positions: Positions | None = None,
        memory: Mode | None = None,
        max_invocations: int | None = None,
    ) -> list[Generation]:
        """Answer prompts in one batch, each with its own images; greedy unless `sampling` says otherwise. `on_text` is
        called with each row's text as it comes. memory: of a model that calls for it, "auto" (when it says so), "off"
        or "always" (at the beginning, and behind each sentence or line), at most `max_invocations` times an answer.
        Raises InputError for a prompt or image that cannot be used, OptionError for memory that the model has not."""


def open_generator(model: Any, provider: Provider = "auto") -> TextGenerator:
    """model: the path of a checkpoint (or its hub id), a bundle or engines; a model of transformers in memory; or what
    answers prompts already. provider: of bundles. Raises SurgeonError where it cannot be loaded."""
    if not isinstance(model, str | Path):
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel):
            from surgeon.torch_generate import TorchGenerator

            return TorchGenerator(model)
        if not callable(getattr(model, "generate", None)) or hasattr(model, "peft_config"):
            raise OptionError(
                f"cannot generate with a {type(model).__name__}: pass a path, a transformers model (an adapter merged, "
                "merge_and_unload) or what open_generator gave"
            )
        generator: TextGenerator = model
        return generator
    match artifact_kind(model):
        case "engines":
            from exporters.tensorrt.runtime import EngineRuntime

            return EngineRuntime(model)
        case "bundle":
            from exporters.onnxruntime import BundleRuntime

            return BundleRuntime(model, provider=provider)
    if provider != "auto":
        raise OptionError(f"provider {provider} is for bundles; {model} is a checkpoint, which torch runs")
    from surgeon.torch_generate import TorchGenerator

    return TorchGenerator(model)


def generate(
    model: Any,
    prompt: str,
    images: Sequence[ImageSource] = (),
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    on_text: OnText | None = None,
    positions: Positions | None = None,
    memory: Mode | None = None,
    max_invocations: int | None = None,
    provider: Provider = "auto",
) -> Generation:
    """The answer to one prompt about images: files, or images of Pillow, shown in their order. model, provider: as for
    `open_generator`; the rest as for `TextGenerator.generate`."""
    if max_new_tokens < 0:
        raise OptionError(f"max_new_tokens is {max_new_tokens}; it is 0 or more")
    if isinstance(images, str | Path | Image.Image):
        images = (images,)
    generator = open_generator(model, provider)
    wanted: dict[str, Any] = {"memory": memory, "max_invocations": max_invocations}
    (generation,) = generator.generate(
        [Prompt(prompt, tuple(images), system)],
        max_new_tokens,
        sampling,
        on_text,
        positions,
        **{name: value for name, value in wanted.items() if value is not None},
    )
    return generation


def stream(model: Any, prompt: str, images: Sequence[ImageSource] = (), **options: Any) -> Iterator[str]:
    """The same answer, piece by piece as it comes; arguments as those of `generate`, without `on_text`. An error is
    raised where the next piece would have come. Whoever stops listening stops the decoding with the next piece."""
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    stopped = threading.Event()

    def add(row: int, text: str) -> None:
        if stopped.is_set():
            raise _Stopped
        pieces.put(text)

    def work() -> None:
        try:
            generate(model, prompt, images, on_text=add, **options)
            pieces.put(None)
        except BaseException as error:  # all of it is the listener's
            pieces.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stopped.set()
        thread.join()


class _Stopped(Exception):
    """Nobody listens any more."""
