"""The two runners of a comparison: the reference first, and forms of one model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from exporters.artifact import ARTIFACT_KINDS, artifact_kind
from exporters.onnxruntime.session import Provider
from exporters.validation.runners import BundleRunner, EngineRunner
from surgeon.checkpoint import Checkpoint
from surgeon.dtypes import PRECISIONS
from surgeon.errors import SurgeonError
from surgeon.families import family
from surgeon.grafts import graft_records
from surgeon.models import config_of
from surgeon.parity.runner import Runner
from surgeon.parity.torch_runner import TorchRunner
from surgeon.positions import Positions, record_of

_TEXT = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
_VISION = (
    "model_type",
    "num_hidden_layers",
    "depth",
    "hidden_size",
    "num_attention_heads",
    "num_heads",
    "intermediate_size",
    "out_hidden_size",
    "vocab_size",
    "image_size",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "hidden_stride",
    "num_position_embeddings",
    "deepstack_visual_indexes",
    "fullatt_block_indexes",
    "window_size",
)
"""Families call the same size by several names; one that a family does not have is None in both forms."""


def open_pair(
    a: str | Path, b: str | Path, positions: Positions | None = None, provider: Provider = "auto"
) -> tuple[Runner, Runner]:
    """Load two checkpoints, bundles or directories of engines, the reference first whichever way they were named.

    The earlier form is the reference of the later; a checkpoint then runs in fp32, whatever it is stored in. An
    unpatched checkpoint is the reference of a patched one. `positions` of both, where they offer a choice; `provider`
    of bundles. Raises SurgeonError where the two are not forms of one model, or are asked with other tokens.
    """
    if ARTIFACT_KINDS.index(artifact_kind(a)) > ARTIFACT_KINDS.index(artifact_kind(b)):
        a, b = b, a
    dtype = "auto" if artifact_kind(b) == "checkpoint" else "fp32"
    # the later first: what cannot be run says so before anything is loaded; weights last, once the sizes are known
    later, config_b = _described(b, dtype, positions, provider)
    earlier, config_a = _described(a, dtype, positions, provider)
    _check_same_model(a, config_a, b, config_b)
    _check_same_prompts(a, config_a, b, config_b)
    candidate, reference = later(), earlier()
    if reference.stage == candidate.stage and _age(reference) > _age(candidate):
        reference, candidate = candidate, reference
    return reference, candidate


def _described(
    path: str | Path, dtype: str, positions: Positions | None, provider: Provider
) -> tuple[Callable[[], Runner], PretrainedConfig]:
    """What loads a form, and its config; a checkpoint's weights are not read yet."""
    match artifact_kind(path):
        case "engines":
            engines = EngineRunner(path, positions)
            return lambda: engines, engines.runtime.config
        case "bundle":
            bundle = BundleRunner(path, positions, provider)
            return lambda: bundle, bundle.runtime.config
    with Checkpoint.open(path, weights="optional") as checkpoint:
        config = config_of(checkpoint)
    return lambda: TorchRunner(path, dtype, positions=positions), config


def _age(candidate: Runner) -> tuple[int, bool, int, bool, int]:
    """What is later is larger."""
    record = candidate.record or {}
    changes = len(record.get("grafts", [])), record.get("positions") is not None, len(record.get("tokens") or {})
    return *changes, record.get("vismem") is not None, list(PRECISIONS).index(candidate.dtype)


def _check_same_model(a: str | Path, config_a: PretrainedConfig, b: str | Path, config_b: PretrainedConfig) -> None:
    def refuse(aspect: str, of_a: Any, of_b: Any) -> SurgeonError:
        return SurgeonError(f"{a} and {b} are not forms of one model: {aspect} {of_a} in one and {of_b} in the other")

    tokens_a, tokens_b = (record_of(config).get("tokens") or {} for config in (config_a, config_b))
    if not (tokens_a.items() <= tokens_b.items() or tokens_b.items() <= tokens_a.items()):
        raise refuse("added tokens", tokens_a, tokens_b)
    sizes_a, sizes_b = _sizes(config_a, tokens_a != tokens_b), _sizes(config_b, tokens_a != tokens_b)
    for name, value in sizes_a.items():
        if value != sizes_b[name]:
            raise refuse(name, value, sizes_b[name])
    grafts_a, grafts_b = graft_records(config_a), graft_records(config_b)
    fewer, more = sorted((grafts_a, grafts_b), key=len)
    if any(graft not in more for graft in fewer):
        raise refuse("grafts", _grafts_text(grafts_a), _grafts_text(grafts_b))
    memory_a, memory_b = record_of(config_a).get("vismem"), record_of(config_b).get("vismem")
    if memory_a is not None and memory_b is not None and memory_a != memory_b:
        raise refuse("vismem", memory_a, memory_b)
    scheme_a, scheme_b = record_of(config_a).get("positions"), record_of(config_b).get("positions")
    if scheme_a is not None and scheme_b is not None and scheme_a != scheme_b:
        raise refuse("positions", scheme_a, scheme_b)


def _sizes(config: PretrainedConfig, before_tokens: bool) -> dict[str, Any]:
    """What makes two configs those of one model, by the words of a message. `before_tokens`: with as many rows as the
    embeddings had before tokens were added, where they were."""
    model_family = family(config.model_type)
    text, vision = model_family.text_config(config), model_family.vision_config(config)
    rows = record_of(config).get("source_vocab_size", text.vocab_size) if before_tokens else text.vocab_size
    return {
        "family": model_family.model_type,
        **{f"text {name}": getattr(text, name, None) for name in _TEXT},
        "text vocab_size": rows,
        "text head_dim": model_family.head_dim(config),
        **{f"vision {name}": getattr(vision, name, None) for name in _VISION},
    }


def _grafts_text(grafts: list[dict[str, Any]]) -> str:
    """Grafts in words that are short enough for a line."""

    def options(graft: Mapping[str, Any]) -> str:
        return ", ".join(f"{key} {value}" for key, value in graft.items() if key not in ("kind", "layers"))

    descriptions = (
        f"{graft['kind']} at layers {', '.join(map(str, graft['layers']))} ({options(graft)})" for graft in grafts
    )
    return " and ".join(descriptions) or "none"


def _check_same_prompts(a: str | Path, config_a: PretrainedConfig, b: str | Path, config_b: PretrainedConfig) -> None:
    allocations = [record_of(config).get("allocation") == "memory" for config in (config_a, config_b)]
    if allocations[0] != allocations[1]:
        raise SurgeonError(
            f"{a} and {b} cannot be compared: in one of them tiles go to the memory alone (tiles=memory), so the same "
            "images are other tokens; compare forms of one patched checkpoint"
        )
