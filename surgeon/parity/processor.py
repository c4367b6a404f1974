"""Prompts and images as transformers' own processor makes them: the one part of a comparison that both sides take
from this tool's code."""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from surgeon.inputs import IMAGE_BACKEND, Inputs, Prompt, image_processor_of
from surgeon.parity.cases import Case
from surgeon.positions import record_of

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_NOT_MADE = (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)
"""What transformers raises where a processor, or a library under it, is missing, broken or misconfigured."""


class ProcessorUnavailable(Exception):
    """transformers' processor cannot be loaded here; the message says why."""


def check_inputs(inputs: Inputs, folder: Path, cases: Sequence[Case]) -> tuple[str, list[str]]:
    """Compare what this tool asks a model with what transformers' own processor would: token ids, masks, pixel values
    and grids of every case, bit for bit. `folder`: the checkpoint's, or a bundle's `processor`.

    -> what was compared, and what differs, in words. Raises ProcessorUnavailable.
    """
    if record_of(inputs.config).get("allocation") == "memory":
        raise ProcessorUnavailable("it knows no images whose tiles go to the memory alone")
    with _processor(inputs, folder) as processor:
        own_images = processor.image_processor
        processor.image_processor = image_processor_of(folder, inputs.config)
        failures = [text for case in cases for text in _differences(inputs, processor, case)]
        summary = f"token ids, pixel values and grids are those of transformers' own {type(processor).__name__}"
        if type(own_images) is not type(processor.image_processor):
            summary += f", with its {IMAGE_BACKEND} image processor"
    return summary, failures


@contextmanager
def _processor(inputs: Inputs, folder: Path) -> Iterator[Any]:
    """AutoProcessor's, loaded as for the unpatched model: transformers knows no patched model_type."""
    with tempfile.TemporaryDirectory(prefix="surgeon-processor-") as name:
        plain = Path(name)
        for file in folder.iterdir():
            if file.is_file() and not file.name.endswith((*_WEIGHTS, ".index.json", ".py")):
                shutil.copyfile(file, plain / file.name)
        config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
        config.pop("auto_map", None)
        config["model_type"] = inputs.family.model_type
        (plain / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            processor = AutoProcessor.from_pretrained(plain, trust_remote_code=False)
        except _NOT_MADE as error:
            raise ProcessorUnavailable(_reason(error)) from error
        if not hasattr(processor, "image_processor"):
            raise ProcessorUnavailable(f"transformers makes a {type(processor).__name__} of {folder}, without images")
        yield processor


def _differences(inputs: Inputs, processor: Any, case: Case) -> list[str]:
    own_inputs = inputs.prepare(case.prompts).model_kwargs()
    try:
        expected = processor.apply_chat_template(
            [_as_conversation(prompt) for prompt in case.prompts],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
    except _NOT_MADE as error:
        raise ProcessorUnavailable(f"it fails on {case.name!r}: {_reason(error)}") from error
    differences = (_difference(name, theirs, own_inputs.get(name)) for name, theirs in expected.items())
    return [f"{case.name}: {text}" for text in differences if text]


def _difference(name: str, theirs: Tensor, ours: Tensor | None) -> str | None:
    """What sets ours apart from what transformers' processor gives, in words."""
    if ours is None:
        return f"transformers' processor gives {name}, which is left out here"
    if ours.shape != theirs.shape:
        return f"{name} is {list(ours.shape)}, transformers' processor gives {list(theirs.shape)}"
    theirs = theirs.to(ours.dtype)
    if torch.equal(ours, theirs):
        return None
    at = tuple(int(i) for i in (ours != theirs).nonzero()[0])
    values = f"{ours[at].item():.6g} instead of {theirs[at].item():.6g}"
    return f"{name} is not what transformers' processor gives: {values} at {list(at)}"


def _as_conversation(prompt: Prompt) -> list[dict[str, Any]]:
    """With images that are files named by text, as transformers takes them."""
    messages = prompt.messages()
    for message in messages:
        for part in message["content"]:
            if isinstance(part.get("image"), Path):
                part["image"] = str(part["image"])
    return messages


def _reason(error: BaseException) -> str:
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed (pip install torchvision)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason is given'}"
