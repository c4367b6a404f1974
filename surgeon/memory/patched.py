"""The patched model: a transformers model class whose config records which grafts it has."""

import functools
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from surgeon.memory.decoder_layer import entry_name, patched_layer_class
from surgeon.memory.graft import Graft
from surgeon.memory.later_turn import drop_cached_pictures
from surgeon.memory.visual_memory import VisualMemory, gather_rows

RECORD = "surgeon"
"""The config key that holds the record: `{"grafts": [{"kind", "layers", ...options}], ...}`."""
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
    decoder.__class__ = _patched_text_model_class(plain)
    for layer in decoder.layers:
        plain_layer: Any = type(layer)
        layer.__class__ = patched_layer_class(plain_layer, layer_shape)
    for entry in getattr(model.config, RECORD)["grafts"]:
        for index in entry["layers"]:
            graft = kinds[entry["kind"]].from_config(decoder.config, entry)
            decoder.layers[index].add_module(entry["kind"], graft)


@cache
def _patched_text_model_class(base: type) -> type:
    class PatchedTextModel(base):
        """The decoder: lets visual embeddings enter the request's memory, and passes the memory to its layers."""

        def forward(
            self,
            input_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            past_key_values: Cache | None = None,
            use_cache: bool | None = None,
            visual_token_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids)
            use_cache = self.config.use_cache if use_cache is None else use_cache
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
            if past_key_values is None:
                memory = VisualMemory()
            else:
                memory = VisualMemory.of(past_key_values, self.config.num_hidden_layers)
            if visual_token_mask is not None and bool(visual_token_mask.any()):
                visual_embeds, mask = gather_rows(inputs_embeds, visual_token_mask)
                memory.extend(self.project_memory(visual_embeds), mask)
            return super().forward(
                inputs_embeds=inputs_embeds,
                past_key_values=past_key_values,
                use_cache=use_cache,
                visual_token_mask=visual_token_mask,
                visual_memory=memory,
                **kwargs,
            )

        def project_memory(self, visual_embeds: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
            """visual_embeds [B, M, d] -> keys and values [B, Hm, M, hd] of every graft, by its name in the memory."""
            return {
                entry_name(layer, graft): graft.project(visual_embeds)
                for layer in self.layers
                for graft in layer.children()
                if isinstance(graft, Graft)
            }

    PatchedTextModel.__name__ = PatchedTextModel.__qualname__ = f"Patched{base.__name__}"
    return PatchedTextModel


@cache
def _register_key_conversion(base: str, patched: str) -> None:
    """Checkpoints with an older layout of keys load into the patched class as they do into the plain one."""
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
            pictures = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
            if "visual_token_mask" not in kwargs and any(kwargs.get(name) is not None for name in pictures):
                kwargs["visual_token_mask"] = self.visual_token_mask(input_ids, inputs_embeds)
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

        @functools.wraps(base.generate)
        def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids") if inputs is None else inputs
            if ids is not None and kwargs.get("past_key_values") is not None:
                kwargs = drop_cached_pictures(self, ids, kwargs)
            return super().generate(inputs, *args, **kwargs)

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
    return Patched
