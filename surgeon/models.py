"""From a checkpoint's config to a model: plain or patched, on the meta device or with weights."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError
from surgeon.families import Family, family
from surgeon.memory.graft import Graft
from surgeon.memory.patched import RECORD, patched_config_class, patched_model_class


def graft_class(kind: str) -> type[Graft]:
    """The graft class of a kind: the `GRAFT` of `surgeon/memory/<kind>.py`."""
    try:
        found: type[Graft] = importlib.import_module(f"surgeon.memory.{kind}").GRAFT
    except (ModuleNotFoundError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint holds grafts of kind {kind!r}, which this version does not know; use a newer one"
        ) from error
    return found


def is_patched(config: PretrainedConfig) -> bool:
    """Whether a config asks for a patched model: one with grafts, or with positions of its own."""
    return bool(getattr(config, RECORD, None))


def grafts_of(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The grafts that a config records: `{"kind", "layers", ...options}` each; none for a plain model."""
    return list((getattr(config, RECORD, None) or {}).get("grafts", []))


def read_config(config: dict[str, Any]) -> PretrainedConfig:
    """The transformers config of a checkpoint's config.json, plain or patched.

    Raises FamilyError for an unsupported model_type, CheckpointError for values that transformers refuses.
    """
    described = family(config["model_type"])
    plain: Any = getattr(transformers, described.config_class)
    config_class = patched_config_class(plain) if config.get(RECORD) else plain
    try:
        return config_class.from_dict({k: v for k, v in config.items() if k not in ("auto_map", "model_type")})
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"config.json is not a usable {described.model_type} config: {error}") from error


def model_class(described: Family, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a config asks for: the family's own, or its patched form with the grafts that are recorded."""
    base: Any = getattr(transformers, described.model_class)
    if not is_patched(config):
        return base
    kinds = sorted({entry["kind"] for entry in grafts_of(config)})
    grafts = [graft_class(kind) for kind in kinds]
    return patched_model_class(base, described.text_model, described.layer_shape, described.visual_token_keys, *grafts)


def build_meta(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a config on the meta device: every parameter has its name, shape and dtype, and no bytes."""
    described = family(config.model_type)
    with torch.device("meta"):
        model = model_class(described, config)._from_config(config, dtype=dtype)
    return model.eval()


def parameter_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Checkpoint key -> the model's parameter name, by transformers' own renaming of older layouts."""
    transforms = get_model_conversion_mapping(model)
    names = {}
    for key in keys:
        name = key
        for transform in transforms:
            name = transform.rename_source_key(name)[0]
        names[key] = name
    return names


def load(
    path: str | Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu", **kwargs: Any
) -> Any:
    """A checkpoint with its weights, plain or patched, ready for `generate`.

    No code in the checkpoint is run: the classes are this installation's. Further keywords go to `from_pretrained`; a
    `device_map` among them says where the weights go, and `device` nothing then.
    Raises CheckpointError, FamilyError.
    """
    from surgeon.remote_code import with_remote_code

    with Checkpoint.open(path) as checkpoint:
        config = read_config(checkpoint.config)
        directory = checkpoint.directory
    chosen: Any = model_class(family(config.model_type), config)
    if is_patched(config):
        chosen = with_remote_code(*chosen.made_by)
    model = chosen.from_pretrained(directory, config=config, dtype=dtype, **kwargs)
    return model.eval() if "device_map" in kwargs else model.to(device).eval()
