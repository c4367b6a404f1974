"""Bundles of tiny checkpoints, and their decoder run as a runtime would, for tests."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from exporters.onnx.manifest import Manifest
from surgeon import models

MAX_LENGTH = 48


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    directory: Path
    manifest: Manifest

    def session(self, graph: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        path = self.directory / self.manifest.graphs[graph].file
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def trained(checkpoint: Path) -> Path:
    """The same with its grafts' parameters moved, as training would: with the gates at zero nothing is seen of them."""
    model = models.load(checkpoint)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".pvm." in name:
                parameter.copy_(
                    torch.full_like(parameter, 0.7)
                    if name.endswith("alpha")
                    else parameter + 0.2 * torch.randn(parameter.shape, generator=generator)
                )
    target = checkpoint.with_name("trained")
    model.save_pretrained(target)
    return target


class DecoderRun:
    """decoder.onnx over its caches, step after step."""

    def __init__(self, exported: Exported, rows: int) -> None:
        self.session = exported.session("decoder")
        self.inputs = {port.name: port for port in exported.manifest.graphs["decoder"].inputs}
        self.rows = rows
        self.caches = {name: self.zeros(name) for name in self.inputs if name.startswith("past_")}

    def zeros(self, name: str, **symbols: int) -> np.ndarray:
        port = self.inputs[name]
        symbols["B"] = self.rows
        shape = [size if isinstance(size, int) else symbols[size] for size in port.shape]
        return np.zeros(shape, dtype=port.dtype)

    def step(self, **feeds: np.ndarray) -> np.ndarray:
        """Feed; inputs that are not given are zero, with one visual slot. -> logits [B, T, V]."""
        length = feeds["inputs_embeds"].shape[1]
        for name in self.inputs:
            if name not in feeds and name not in self.caches:
                feeds[name] = self.zeros(name, S=length, M=1)
        names = ["logits", *(name.replace("past_", "present_") for name in self.caches)]
        logits, *present = self.session.run(names, feeds | self.caches)
        self.caches = dict(zip(self.caches, present, strict=True))
        return logits
