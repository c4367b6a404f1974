"""From a checkpoint's config to a model: plain or patched, on the meta device or with weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError, FamilyError
from surgeon.families import Family, family
from surgeon.grafts import asks_for_patched_class, class_makers, is_patched, model_parts
from surgeon.importers import refuse_importable
from surgeon.memory.decoder_layer import check_parts
from surgeon.memory.lora import UnknownTargetError
from surgeon.memory.patched import RECORD, patched_config_class
from surgeon.record import check_record, has_record
from surgeon.remote_code import with_remote_code
from surgeon.sizes import one_line
from surgeon.weights import WeightPlan, stored_weights


def read_config(config: dict[str, Any], *, plain: bool = False) -> PretrainedConfig:
    """The transformers config of a checkpoint's config.json, plain or patched. `plain`: of the family's own class in
    any case, which is the one that transformers' Auto classes know; the record is an attribute of it.

    Raises FamilyError for an unsupported model_type, CheckpointError for values that no model can have, and for a
    record of grafts that is none. Whoever has the config may rely on its types, and on sizes that can be built.
    """
    described = family(model_type_of(config))
    recorded = has_record(config)
    config_class: Any = getattr(transformers, described.config_class)
    if asks_for_patched_class(config.get(RECORD)) and not plain:
        config_class = patched_config_class(config_class)
    try:
        parsed: PretrainedConfig = config_class.from_dict(
            {key: value for key, value in config.items() if key not in ("auto_map", "model_type")}
        )
    except Exception as error:  # all of it is transformers' own, and what it trips over is the config
        raise _unusable(described, error) from error
    described.check_sizes(parsed)
    if recorded:
        check_record(described, parsed, model_type_of(config))
    return parsed


def config_values(model: PreTrainedModel) -> dict[str, Any]:
    """The config.json of a model in memory."""
    values: dict[str, Any] = json.loads(json.dumps(model.config.to_dict(), default=str))
    return values


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
    record = getattr(config, RECORD)
    make_class, _ = class_makers(record)
    lvlm_class: type[PreTrainedModel] = make_class(
        base,
        described.text_model,
        described.norm_placement,
        described.visual_token_keys,
        *model_parts(described, record),
    )
    return lvlm_class


def build_meta(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a config on the meta device: every parameter has its name, shape and dtype, and no bytes.

    Raises CheckpointError for a config of which transformers cannot make a model, FamilyError where its decoder layers
    are not what the family says.
    """
    described = family(config.model_type)
    lvlm_class: Any = model_class(described, config)
    try:
        model: PreTrainedModel = _on_meta(lvlm_class, config, dtype)
    except UnknownTargetError as error:  # which layers there are is known to the model alone
        raise CheckpointError(f"config.json: {RECORD}.vismem: targets: {error}") from error
    except Exception as error:
        if not is_patched(config) or not _builds(described, config, dtype):
            raise _unusable(described, error) from error
        raise  # the model is sound without its grafts: a fault of their code
    decoder: Any = model.get_submodule(described.text_model)
    for layer in decoder.layers:
        try:
            check_parts(layer, described.norm_placement)
        except ValueError as error:
            raise FamilyError(f"family {described.model_type} declares norm_placement wrongly: {error}") from error
    return model.eval()


def _on_meta(lvlm_class: Any, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return lvlm_class._from_config(config, dtype=dtype)


def _builds(described: Family, config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Whether transformers makes a model of a patched config without its grafts."""
    values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", RECORD)}
    try:
        plain = getattr(transformers, described.config_class).from_dict(values)
        _on_meta(getattr(transformers, described.model_class), plain, dtype)
    except Exception:  # whatever it is, the caller has its like and tells it
        return False
    return True


class StoredModel(NamedTuple):
    """A checkpoint, read and checked."""

    config: PretrainedConfig
    model: PreTrainedModel
    """On the meta device."""
    weights: WeightPlan
    """For each of the model's parameters, where the checkpoint holds it."""


def config_of(checkpoint: Checkpoint) -> PretrainedConfig:
    """The transformers config of an opened checkpoint, plain or patched.

    Raises CheckpointError for a layout that has to be imported first, and as `read_config`.
    """
    refuse_importable(checkpoint)
    return read_config(checkpoint.config)


def read_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> StoredModel:
    """What every command makes of an opened checkpoint before anything else: its model in `dtype` (by default the
    checkpoint's), whose every tensor the checkpoint holds, and none besides. No weight is read.

    Raises CheckpointError where config and tensors disagree, and as `config_of`; FamilyError.
    """
    config = config_of(checkpoint)
    model = build_meta(config, dtype or checkpoint.dtype)
    return StoredModel(config, model, stored_weights(model, checkpoint))


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    key_mapping: dict[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """A checkpoint with its weights, plain or patched, ready for `generate`.

    No code in the checkpoint is run: the classes are this installation's. Further keywords go to `from_pretrained`; a
    `device_map` among them says where the weights go, and `device` nothing then.
    Raises CheckpointError, also where a weight would be missing, left over or of another shape, FamilyError.
    """
    with Checkpoint.open(path) as checkpoint:
        directory = checkpoint.directory
        config = config_of(checkpoint)
        if getattr(config, "quantization_config", None) is None:  # else transformers' quantiser knows the tensors
            stored_weights(build_meta(config, checkpoint.dtype), checkpoint, key_mapping)
    lvlm_class: Any = model_class(family(config.model_type), config)
    if is_patched(config):
        lvlm_class = with_remote_code(*lvlm_class.made_by)
    model, loading = lvlm_class.from_pretrained(
        directory, config=config, dtype=dtype, key_mapping=key_mapping, output_loading_info=True, **kwargs
    )
    _check_loaded(directory, loading)
    return model.eval() if "device_map" in kwargs else model.to(device).eval()


def _check_loaded(directory: Path, loading: dict[str, Any]) -> None:
    """What transformers says of the loading itself: keywords may have led it to other files than those that were
    checked. Raises CheckpointError."""
    for problem, report in (
        ("found no values for", loading["missing_keys"]),
        ("found no place for", loading["unexpected_keys"]),
        ("found other shapes for", {key for key, *_ in loading["mismatched_keys"]}),
        ("could not load all of", loading["error_msgs"]),
    ):
        if report:
            names = sorted(map(str, report))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{directory}: transformers {problem} {', '.join(names[:3])}{more}; nothing was loaded"
            )
