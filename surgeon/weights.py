"""The weight plan: where every parameter of a model gets its values from. Nothing is read to make one."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from surgeon.checkpoint.reader import Checkpoint
from surgeon.dtypes import name_of
from surgeon.errors import CheckpointError
from surgeon.memory.inserted import Constant, Initialiser, Normal
from surgeon.new_rows import NewRow, new_row_values


@dataclass(frozen=True)
class Stored:
    """A tensor of the source checkpoint, as it is."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Initialised:
    """New values, a function of the seed and the parameter's name alone: not of the order of passes, nor of cores."""

    initialiser: Initialiser
    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def values(self, name: str) -> torch.Tensor:
        """The tensor of this plan for the parameter `name`."""
        match self.initialiser:
            case Constant(value=value):
                return torch.full(self.shape, value, dtype=self.dtype)
            case Normal(std=std):
                key = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:16]
                generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
                drawn = generator.standard_normal(self.shape, dtype=np.float32) * np.float32(std)
                return torch.from_numpy(drawn).to(self.dtype)


@dataclass(frozen=True)
class Extended:
    """A tensor of the source checkpoint with new rows: in rows of it that no token has, or behind its last."""

    key: str
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: tuple[NewRow, ...]
    noise_name: str
    """The name that the noise is a function of: the parameter's, or that of the one it is tied to."""

    @property
    def grows(self) -> bool:
        """Whether it has more rows than the source's."""
        return self.shape != self.source_shape

    def new_rows(self, source: Checkpoint) -> torch.Tensor:
        """The values of `rows`, [N, d], in their order. Raises CheckpointError as `Checkpoint.read`."""
        table = source.read(self.key)
        values = new_row_values(self.noise_name, self.rows, table, lambda: source.release(self.key))
        source.release(self.key)
        return values

    def table(self, source: Checkpoint) -> torch.Tensor:
        """The whole tensor: the source's rows bit for bit, and the new ones. Raises CheckpointError."""
        table = torch.empty(self.shape, dtype=self.dtype)
        table[: self.source_shape[0]] = source.read(self.key)
        source.release(self.key)
        table[[each.row for each in self.rows]] = self.new_rows(source)
        return table


@dataclass(frozen=True)
class Tied:
    """The same tensor as another parameter's."""

    name: str


WeightSource = Stored | Extended | Initialised | Tied
WeightPlan = dict[str, WeightSource]


def parameter_names(
    model: PreTrainedModel, keys: Iterable[str], key_mapping: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Checkpoint key -> the model's parameter name, by transformers' own renaming of older layouts. `key_mapping`: as
    `from_pretrained` takes it."""
    transforms = get_model_conversion_mapping(model, dict(key_mapping) if key_mapping else None)
    names = {}
    for key in keys:
        name = key
        for transform in transforms:
            name = transform.rename_source_key(name)[0]
        names[key] = name
    return names


def stored_weights(
    model: PreTrainedModel, checkpoint: Checkpoint, key_mapping: Mapping[str, str] | None = None
) -> WeightPlan:
    """Where a checkpoint holds each of a model's parameters and buffers, tied ones included. The model may be on the
    meta device; no weight is read. A checkpoint without weights gives a plan of the model's own names and shapes.

    Raises CheckpointError unless every stored tensor has a place of its shape and kind of dtype, and every place a
    tensor: what is left out here would be random or forgotten in the loaded model. Tensors that transformers computes
    itself (rotary frequencies of old checkpoints) are passed over.
    """
    _refuse_quantised(model)
    expected: dict[str, torch.Tensor] = model.state_dict()
    if not checkpoint.tensors:
        return {name: Stored(name, tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()}
    plan: WeightPlan = {}
    computed = _computed_names(model)
    for key, name in parameter_names(model, checkpoint.tensors, key_mapping).items():
        info = checkpoint.tensors[key]
        shape = tuple(info.shape)
        if name not in expected:
            if computed is not None and computed.search(name):
                continue
            raise CheckpointError(
                f"config.json has no place for tensor {key} {list(shape)}: config and weights are not of one model"
            )
        if shape != tuple(expected[name].shape):
            raise CheckpointError(
                f"config.json and tensors disagree: {key} is {list(shape)}, "
                f"the config asks for {list(expected[name].shape)}"
            )
        check_dtype(key, info.torch_dtype, expected[name].dtype)
        before = plan.get(name)
        if isinstance(before, Stored):
            raise CheckpointError(f"tensors {before.key} and {key} are both {name}: remove one of them")
        plan[name] = Stored(key, shape, info.torch_dtype)
    for name, target in model.all_tied_weights_keys.items():
        if name not in plan and target in plan:
            plan[name] = Tied(target)
        elif target not in plan and name in plan:
            plan[target] = Tied(name)
    missing = sorted(set(expected) - set(plan))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"config.json asks for tensors that the checkpoint does not hold: {', '.join(missing[:3])}{more}"
        )
    return plan


def _refuse_quantised(model: PreTrainedModel) -> None:
    settings = getattr(model.config, "quantization_config", None)
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
        raise CheckpointError(
            f"the checkpoint is quantised ({getattr(method, 'value', method)}), which is not supported yet: use the "
            "one before quantisation"
        )


def check_dtype(key: str, stored: torch.dtype, expected: torch.dtype) -> None:
    """Raises CheckpointError for values that a cast would not make the model's: quantised ones without their scales,
    integers where the model computes with real numbers."""
    real = expected.is_floating_point and stored.is_floating_point and stored.itemsize > 1
    if not real and stored != expected:
        dtypes = [name_of(dtype) for dtype in (stored, expected)]
        raise CheckpointError(
            f"config.json and tensors disagree: {key} is {dtypes[0]}, where the model has {dtypes[1]}; of "
            "quantised weights, use the checkpoint before quantisation"
        )


def _computed_names(model: PreTrainedModel) -> re.Pattern[str] | None:
    """What matches the names of stored tensors that transformers passes over without a word, as `from_pretrained` of
    this model does; None where there are none."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return re.compile("|".join(f"(?:{pattern})" for pattern in sorted(patterns))) if patterns else None
