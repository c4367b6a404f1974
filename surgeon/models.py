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
from surgeon.record import check_record, has_record
from surgeon.sizes import one_line


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


def read_config(config: dict[str, Any], *, plain: bool = False) -> PretrainedConfig:
    """The transformers config of a checkpoint's config.json, plain or patched. `plain`: of the family's own class in
    any case, which is the one that transformers' Auto classes know; the record is an attribute of it.

    Raises FamilyError for an unsupported model_type, CheckpointError for values that no model can have, and for a
    record of grafts that is none. Whoever has the config may rely on its types, and on sizes that can be built.
    """
    described = family(model_type_of(config))
    patched = has_record(config)
    config_class: Any = getattr(transformers, described.config_class)
    if patched and not plain:
        config_class = patched_config_class(config_class)
    try:
        parsed: PretrainedConfig = config_class.from_dict(
            {key: value for key, value in config.items() if key not in ("auto_map", "model_type")}
        )
    except Exception as error:  # all of it is transformers' own, and what it trips over is the config
        raise _unusable(described, error) from error
    described.check_sizes(parsed)
    if patched:
        check_record(described, parsed)
    return parsed


def model_type_of(config: dict[str, Any]) -> str:
    """Raises CheckpointError where a config.json does not say."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("config.json has no model_type: copy it from where the checkpoint was made")
    return model_type


def _unusable(described: Family, error: Exception) -> CheckpointError:
    return CheckpointError(f"config.json is not a usable {described.model_type} config: {one_line(error)}")


def model_class(described: Family, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a config asks for: the family's own, or its patched form with the grafts that are recorded."""
    base: Any = getattr(transformers, described.model_class)
    if not is_patched(config):
        return base
    kinds = sorted({entry["kind"] for entry in grafts_of(config)})
    grafts = [graft_class(kind) for kind in kinds]
    return patched_model_class(base, described.text_model, described.layer_shape, described.visual_token_keys, *grafts)


def build_meta(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a config on the meta device: every parameter has its name, shape and dtype, and no bytes.

    Raises CheckpointError for a config of which transformers cannot make a model.
    """
    described = family(config.model_type)
    chosen: Any = model_class(described, config)
    try:
        model: PreTrainedModel = _on_meta(chosen, config, dtype)
    except Exception as error:
        if not is_patched(config) or not _builds(described, config, dtype):
            raise _unusable(described, error) from error
        raise  # the model is sound without its grafts: a fault of their code
    return model.eval()


def _on_meta(chosen: Any, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return chosen._from_config(config, dtype=dtype)


def _builds(described: Family, config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Whether transformers makes a model of a patched config without its grafts."""
    values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", RECORD)}
    try:
        plain = getattr(transformers, described.config_class).from_dict(values)
        _on_meta(getattr(transformers, described.model_class), plain, dtype)
    except Exception:  # whatever it is, the caller has its like and tells it
        return False
    return True


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

    No code in the checkpoint is run: the classes are this installation's. Further keywords go to `from_pretrained`.
    Raises CheckpointError, FamilyError.
    """
    from surgeon.remote_code import with_remote_code

    with Checkpoint.open(path) as checkpoint:
        config = read_config(checkpoint.config)
        directory = checkpoint.directory
    chosen: Any = model_class(family(config.model_type), config)
    if is_patched(config):
        chosen = with_remote_code(chosen)
    model = chosen.from_pretrained(directory, config=config, dtype=dtype, **kwargs)
    return model.to(device).eval()
