"""The patched model: a transformers model class whose config records which grafts it has."""

import functools
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from surgeon.memory.decoder_layer import patched_layer_class
from surgeon.memory.fused import fused_form
from surgeon.memory.graft import Graft
from surgeon.memory.later_turn import drop_cached_pictures
from surgeon.memory.text_model import patched_text_model_class
from surgeon.memory.tiled import ROW_ALIGNED, continued_positions, has_pictures, resolve_tiles
from surgeon.memory.visual_memory import VisualMemory

RECORD = "surgeon"
"""The config key that holds the record: `{"grafts": [{"kind", "layers", ...options}], ...}`, and for tiled pictures
`layout` (`side`, `thumbnail`), `positions` (`scheme`, `tile_order`) and `allocation`; see `tiled` and `rope_dhr`."""
MODEL_TYPE_PREFIX = "surgeon_"


@cache
def patched_config_class(base: Any) -> type[PretrainedConfig]:
    """The config class of a patched `base`. Its model_type is its own, so that no loader mistakes the patched
    checkpoint for the plain model and drops the grafts."""
    name = f"Surgeon{base.__name__}"
    return type(name, (base,), {"model_type": MODEL_TYPE_PREFIX + base.model_type, "__module__": __name__})


def graft_model(model: PreTrainedModel, text_model: str, layer_shape: str, kinds: Mapping[str, type[Graft]]) -> None:
    """Turn a plain model into a patched one, in place, by its config's record. Base parameters keep their names."""
    decoder: Any = model.get_submodule(text_model)
    plain: Any = type(decoder)
    decoder.__class__ = patched_text_model_class(plain)
    for layer in decoder.layers:
        plain_layer: Any = type(layer)
        layer.__class__ = patched_layer_class(plain_layer, layer_shape)
    for entry in getattr(model.config, RECORD)["grafts"]:
        for index in entry["layers"]:
            graft = kinds[entry["kind"]].from_config(decoder.config, entry)
            graft.fused = fused_form(graft.kind)
            decoder.layers[index].add_module(entry["kind"], graft)


@cache
def _register_key_conversion(base: str, patched: str) -> None:
    """Checkpoints with an older layout of keys load into the patched class as they do into the plain one: transformers
    knows the layouts by the name of a class, or by a model_type."""
    from transformers import conversion_mapping

    mapping = conversion_mapping.get_checkpoint_conversion_mapping(base)
    if mapping is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(patched, mapping, overwrite=True)


def patched_model_class(
    base: type[PreTrainedModel],
    text_model: str,
    layer_shape: str,
    visual_token_keys: tuple[str, ...],
    *grafts: type[Graft],
) -> type[PreTrainedModel]:
    """`base` with grafts of the given kinds.

    text_model: the decoder's module path. visual_token_keys: the config keys that hold the ids of visual tokens.
    """
    kinds = {graft.kind: graft for graft in grafts}
    plain_config: Any = base.config_class

    class Patched(base):
        config_class = patched_config_class(plain_config)

        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            graft_model(self, text_model, layer_shape, kinds)
            self.post_init()

        def _init_weights(self, module: torch.nn.Module) -> None:
            if isinstance(module, Graft):
                module.reset_parameters(self.config.get_text_config().initializer_range)
            else:
                super()._init_weights(module)

        @functools.wraps(base.forward)
        def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
            pictures = has_pictures(kwargs)
            if pictures and kwargs.get("visual_token_mask") is None:
                kwargs["visual_token_mask"] = self.visual_token_mask(input_ids, inputs_embeds)
            if not pictures:  # what the prompt brought, which later calls of a generation are given again
                kwargs = {name: value for name, value in kwargs.items() if name not in ROW_ALIGNED}
            record = getattr(self.config, RECORD)
            kwargs = resolve_tiles(self, record, kwargs.get("visual_token_mask"), kwargs)
            if not record.get("positions"):
                return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            assert tokens is not None
            kwargs = self._with_compressed_positions(tokens, kwargs)
            outputs = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
            cache, position_ids = outputs.past_key_values, kwargs.get("position_ids")
            if cache is not None and position_ids is not None:
                memory = VisualMemory.of(cache, self.config.get_text_config().num_hidden_layers)
                memory.next_position = position_ids.max(-1).values + 1
            return outputs

        def _with_compressed_positions(self, tokens: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
            """What follows from position ids that do not rise by one; tokens [B, S, ...]."""
            batch_size, length = tokens.shape[:2]
            cache = kwargs.get("past_key_values")
            if kwargs.get("position_ids") is None and cache is not None:
                memory = VisualMemory.of(cache, self.config.get_text_config().num_hidden_layers)
                kwargs["position_ids"] = continued_positions(memory, length)
            if kwargs.get("position_ids") is None:
                return kwargs
            if kwargs["position_ids"].shape[0] != batch_size:
                kwargs["position_ids"] = kwargs["position_ids"].expand(batch_size, -1)
            if cache is None and kwargs.get("attention_mask") is None and kwargs.get("sample_ids") is None:
                # without one transformers takes every jump of the ids for the start of another packed sample
                kwargs["attention_mask"] = torch.ones((batch_size, length), dtype=torch.int64, device=tokens.device)
            kwargs["compressed_positions"] = True
            return kwargs

        @functools.wraps(base.generate)
        def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids") if inputs is None else inputs
            if ids is not None:
                visual = self.visual_token_mask(ids, None) if has_pictures(kwargs) else None
                kwargs = resolve_tiles(self, getattr(self.config, RECORD), visual, kwargs)
                if kwargs.get("past_key_values") is not None:
                    kwargs = drop_cached_pictures(self, ids, kwargs)
            return super().generate(inputs, *args, **kwargs)

        def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
            super()._validate_model_kwargs({n: v for n, v in model_kwargs.items() if n not in ROW_ALIGNED})

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
            """As in transformers, without its reentrant form. Raises ValueError for that."""
            if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
                # It replays each layer apart from the graph that the grafts' keys and values share.
                raise ValueError("use_reentrant=True does not work with grafted memories; use use_reentrant=False")
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

        def visual_token_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
            """Which positions hold a visual token, bool [B, S]: from ids [B, S] or else embeddings [B, S, d]."""
            ids = torch.tensor([getattr(self.config, key) for key in visual_token_keys])
            if input_ids is not None:
                return torch.isin(input_ids, ids.to(input_ids.device))
            assert inputs_embeds is not None
            placeholders = self.get_input_embeddings()(ids.to(inputs_embeds.device))
            return (inputs_embeds[:, :, None] == placeholders).all(-1).any(-1)

    Patched.__name__ = Patched.__qualname__ = f"Surgeon{base.__name__}"
    _register_key_conversion(base.__name__, Patched.__name__)
    _register_key_conversion(plain_config.model_type, MODEL_TYPE_PREFIX + plain_config.model_type)
    return Patched
