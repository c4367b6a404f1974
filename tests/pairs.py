"""A tiny checkpoint in torch beside its bundle, for tests that compare the two."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from checkpoints import tiny_checkpoint
from exporters.export import export_bundle
from exporters.onnx.manifest import Manifest
from patching import apply
from surgeon import models
from surgeon.inputs import Inputs, ModelInputs, Side
from surgeon.memory.inserted import Inserted
from surgeon.memory.patched import RECORD
from surgeon.memory.visibility import Visibility
from surgeon.positions import Positions, choose_positions, record_of

MAX_LENGTH = 256
PLAIN: tuple[str, ...] = ()
PVM = ("pvm:layers=1,2,latent=32",)
MIXIN = ("mixin:layers=0,2,num_heads=3,intermediate=48,rope_theta=5000",)  # turns unlike the backbone
VISMEM = ("memory-tokens", "vismem:query=4,short=3,long=5,layers=1,2,rank=4,window=64")
Row = list[str | Image.Image]


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Pair:
    """A checkpoint and its bundle."""

    checkpoint: Path
    bundle: Path

    @classmethod
    def within(cls, folder: Path) -> "Pair":
        """The one that `make_pair` made there."""
        patched = folder / "patched"
        return cls(patched if patched.exists() else folder / "source", folder / "bundle")

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.load(self.bundle)

    def graph(self, name: str) -> onnx.GraphProto:
        """As it is in its file, without weights."""
        return onnx.load(self.bundle / self.manifest.graphs[name].file, load_external_data=False).graph

    def session(self, graph: str) -> ort.InferenceSession:
        """A graph as it is, without rewrites."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        path = self.bundle / self.manifest.graphs[graph].file
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    @cached_property
    def model(self) -> Any:
        model = models.load(self.checkpoint, dtype=torch.float32)
        # without an end token every row goes on for as long as it is asked to
        model.generation_config = GenerationConfig(pad_token_id=0)
        return model

    @cached_property
    def inputs(self) -> Inputs:
        return Inputs.from_directory(self.checkpoint)

    def raw(self, rows: list[Row], side: Side = "right", positions: Positions | None = None) -> ModelInputs:
        """Rows of text and images as they are, without a chat template around them."""
        token, record = self.inputs.image_token, record_of(self.inputs.config)
        thumbnails = record.get("allocation") == "memory"
        processed = [[self.inputs.process_image(part) for part in row if not isinstance(part, str)] for row in rows]
        ids = [
            self.inputs.tokenize(
                "".join(p if isinstance(p, str) else token for p in row),
                [(1, 1, 1) if thumbnails else grid for _, grid in images],
            )
            for row, images in zip(rows, processed, strict=True)
        ]
        length = max(map(len, ids))
        input_ids, mask = np.zeros((2, len(rows), length), dtype=np.int64)
        for i, row_ids in enumerate(ids):
            where = slice(len(row_ids)) if side == "right" else slice(length - len(row_ids), None)
            input_ids[i, where], mask[i, where] = row_ids, 1
        image_mask = (input_ids == self.inputs.family.image_token_id(self.inputs.config)).astype(np.int64)
        return ModelInputs(
            self.inputs.family,
            input_ids,
            mask,
            image_mask,
            [[pixels for pixels, _ in images] for images in processed],
            [[grid for _, grid in images] for images in processed],
            choose_positions(self.inputs.config, positions),
            "layout" in record,
        )

    @torch.no_grad()
    def greedy(self, inputs: ModelInputs, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """transformers' tokens [B, steps] and logits [B, steps, V]; `inputs` are padded on the left."""
        generated = self.model.generate(
            **inputs.model_kwargs(),
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = np.stack([step.numpy() for step in generated.logits], axis=1)
        return generated.sequences[:, -steps:].numpy(), logits


class DecoderRun:
    """decoder.onnx over its caches, step after step, as a runtime without rewrites would run it."""

    def __init__(self, pair: Pair, rows: int) -> None:
        self.session = pair.session("decoder")
        self.inputs = {port.name: port for port in pair.manifest.graphs["decoder"].inputs}
        self.rows = rows
        self.caches = {name: self.zeros(name) for name in self.inputs if name.startswith("past_")}

    def zeros(self, name: str, **symbols: int) -> np.ndarray:
        port = self.inputs[name]
        symbols["B"] = self.rows
        shape = [size if isinstance(size, int) else symbols[size] for size in port.shape]
        return np.zeros(shape, dtype=port.dtype)

    def step(self, **feeds: np.ndarray) -> np.ndarray:
        """Feed; inputs that are not given are zero, with one visual slot. A `memory_mask` [B, M] is that of rows, with
        `memory_places` [B, M] where tokens see what stands at or before their place. -> logits [B, T, V]."""
        length = feeds["inputs_embeds"].shape[1]
        places = feeds.pop("memory_places", None)
        for name in self.inputs:
            if name not in feeds and name not in self.caches:
                feeds[name] = self.zeros(name, S=length, M=1)
        if places is not None and len(self.inputs["memory_mask"].shape) == 3:
            tokens = feeds["write_indices"][:, None] + np.arange(length)
            feeds["memory_mask"] = feeds["memory_mask"][:, None] & (places[:, None] <= tokens[..., None])
        names = ["logits", *(name.replace("past_", "present_") for name in self.caches)]
        logits, *present = self.session.run(names, feeds | self.caches)
        self.caches = dict(zip(self.caches, present, strict=True))
        return logits


def make_pair(
    folder: Path,
    model_type: str,
    recipe: Sequence[str],
    dtype: torch.dtype,
    visibility: Visibility | None = None,
    **options: Any,
) -> Pair:
    """A tiny checkpoint with three layers, patched where there is a recipe, its gates open, and its bundle.
    `visibility`: of its grafts, where it is not that which passes give them."""
    checkpoint = tiny_checkpoint(folder / "source", model_type, **{"num_hidden_layers": 3, **options})
    if recipe:
        apply(checkpoint, folder / "patched", *recipe)
        checkpoint = folder / "patched"
        open_gates(checkpoint)
        if visibility is not None:
            record_visibility(checkpoint, visibility)
    export_bundle(checkpoint, folder / "bundle", dtype=dtype, max_length=MAX_LENGTH)
    return Pair.within(folder)


def record_visibility(checkpoint: Path, visibility: Visibility) -> None:
    """Of every graft in a checkpoint's config."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    for entry in config[RECORD]["grafts"]:
        entry["visibility"] = visibility
    path.unlink()  # never write into a file that may share its bytes
    path.write_text(json.dumps(config, indent=2) + "\n")


def open_gates(checkpoint: Path) -> None:
    """Grafts as after training: gates open, matrices of a size that makes attention choose."""
    model = models.load(checkpoint)
    grafts = [(name, module) for name, module in model.named_modules() if isinstance(module, Inserted)]
    gates = {f"{name}.{gate}": 0.8 - 0.3 * i for name, graft in grafts for i, gate in enumerate(graft.gates)}
    own = {f"{name}.{parameter}" for name, graft in grafts for parameter, _ in graft.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for path in checkpoint.glob("*.safetensors"):
        tensors = load_file(path)
        if not own & tensors.keys():
            continue
        for name in sorted(own & tensors.keys()):
            # of what forms memory, one matrix behind the other: more would make noise of rounding
            scale = 0.1 if ".vismem." in name else 0.2
            noise = torch.randn(tensors[name].shape, generator=generator) * scale
            tensors[name] = torch.full_like(tensors[name], gates[name]) if name in gates else tensors[name] + noise
        path.unlink()  # never write into a file that may share its bytes
        save_file(tensors, path, {"format": "pt"})
