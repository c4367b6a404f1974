"""The patched model: transformers' own classes of a model, whose config records which grafts they have.

What grafts need is at or below the base model, because trainers and servers call it and put a head of their own on it.
"""

import functools
import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from surgeon.memory.decoder_layer import add_graft, check_parts, patched_layer_class
from surgeon.memory.fused import fused_form
from surgeon.memory.graft import Graft
from surgeon.memory.later_turn import drop_cached_images
from surgeon.memory.pickled import Rebuilt, named_after
from surgeon.memory.text_model import patched_text_model_class
from surgeon.memory.tiled import ROW_ALIGNED, has_images, resolve_tiles
from surgeon.memory.visibility import visibility_of
from surgeon.memory.visual_memory import VisualMemory

RECORD = "surgeon"
"""The config key that holds the record: `{"grafts": [{"kind", "layers", "visibility", ...options}], ...}`, and for
tiled images `layout` (`side`, `thumbnail`), `positions` (`scheme`, `tile_order`) and `allocation`; see `tiled` and
`rope_dhr`."""
MODEL_TYPE_PREFIX = "surgeon_"
INSERTED = ("vismem",)
"""The modules that passes put into the base model itself."""


@cache
def patched_config_class(base: Any) -> type[PretrainedConfig]:
    """The config class of a patched `base`. Its model_type is its own, so that no loader mistakes the patched
    checkpoint for the plain model and drops the grafts."""
    name = f"Surgeon{base.__name__}"
    attributes = {"model_type": MODEL_TYPE_PREFIX + base.model_type, "__module__": __name__}
    return type(name, (Rebuilt, base), {**attributes, "made_by": (patched_config_class, (base,))})


def check_visual_token_mask(mask: Tensor, tokens: Any, images: bool) -> None:
    """tokens [B, S, ...], `images`: whether pixel values come with them. Raises ValueError for a mask that cannot be
    theirs."""
    if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"visual_token_mask is {mask.dtype} {list(mask.shape)}: pass torch.bool {list(tokens.shape[:2])}, one for "
            "each token of this call"
        )
    if images and not bool(mask.any()):
        raise ValueError("pixel values came with a visual_token_mask that is False everywhere: nothing would enter")


def graft_model(base_model: Any, text_model: str, norm_placement: str, kinds: Mapping[str, type[Graft]]) -> None:
    """Give a plain base model its grafts, in place, by its config's record. Parameters that it had keep their names.

    text_model: the decoder's path within it.
    """
    record = getattr(base_model.config, RECORD)
    decoder: Any = base_model.get_submodule(text_model)
    plain: Any = type(decoder)
    decoder.__class__ = patched_text_model_class(plain, visibility_of(record))
    for layer in decoder.layers:
        check_parts(layer, norm_placement)
        plain_layer: Any = type(layer)
        layer.__class__ = patched_layer_class(plain_layer, norm_placement)
        layer.graft_sites = {}
    for entry in record["grafts"]:
        for index in entry["layers"]:
            graft = kinds[entry["kind"]].from_config(decoder.config, entry)
            graft.fused = fused_form(graft.kind)
            add_graft(decoder.layers[index], graft)


class _WithGrafts:
    """What a patched model and its base model share, in front of their transformers class."""

    config: Any

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, Graft):
            module.reset_parameters(self.config.get_text_config().initializer_range)
        else:
            super()._init_weights(module)  # type: ignore[misc]  # of the class behind

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """As in transformers, without its reentrant form. Raises ValueError for that."""
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            # It replays each layer with the gradients of its positional arguments alone: none would reach the images.
            raise ValueError("use_reentrant=True does not work with grafted memories; use use_reentrant=False")
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)  # type: ignore[misc]


@cache
def patched_base_model_class(
    base: Any, text_model: str, norm_placement: str, visual_token_keys: tuple[str, ...], *grafts: type[Graft]
) -> Any:
    """`base`, a model without a head, with grafts of the given kinds.

    text_model: the decoder's path within it. visual_token_keys: the config keys that hold the ids of visual tokens.
    """
    parameters = [name for name in inspect.signature(base.forward).parameters if name != "self"]

    class PatchedBaseModel(Rebuilt, _WithGrafts, base):
        """Knows where the images of a call stand, and tells the decoder."""

        made_by = (patched_base_model_class, (base, text_model, norm_placement, visual_token_keys, *grafts))
        config_class = patched_config_class(base.config_class)

        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            graft_model(self, text_model, norm_placement, {graft.kind: graft for graft in grafts})
            self.post_init()

        @functools.wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """As the base's, and visual_token_mask bool [B, S] where inputs_embeds [B, S, d] hold images' features
            already, or no pixel values come with them. Raises ValueError where it is missing."""
            kwargs |= dict(zip(parameters, args, strict=False))
            if kwargs.get("pixel_values_videos") is not None and "video_token_id" not in visual_token_keys:
                raise ValueError("this family takes no pixel_values_videos: pass a video's frames as images")
            images = has_images(kwargs)
            input_ids, inputs_embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
            if kwargs.get("visual_token_mask") is not None and (images or input_ids is None):
                tokens = input_ids if inputs_embeds is None else inputs_embeds
                check_visual_token_mask(kwargs["visual_token_mask"], tokens, images)
            if images and kwargs.get("visual_token_mask") is None:
                kwargs["visual_token_mask"] = self.visual_token_mask(input_ids, inputs_embeds)
            if not images:  # the prompt's own inputs, which `generate` passes again to later calls
                brought = ROW_ALIGNED if input_ids is None else (*ROW_ALIGNED, "visual_token_mask")
                kwargs = {name: value for name, value in kwargs.items() if name not in brought}
            if input_ids is None and kwargs.get("visual_token_mask") is None:
                raise ValueError(
                    "embeddings do not say whether images are among them, which would have to enter the memory: pass "
                    "visual_token_mask, bool [B, S], True at the images' tokens and False everywhere for text alone"
                )
            record = getattr(self.config, RECORD)
            kwargs = resolve_tiles(self, record, kwargs.get("visual_token_mask"), kwargs)
            if record.get("positions"):
                tokens = input_ids if inputs_embeds is None else inputs_embeds
                assert tokens is not None
                kwargs = self._with_compressed_positions(tokens, kwargs)
            return super().forward(**kwargs, has_images=images)

        def _with_compressed_positions(self, tokens: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
            """What follows from position ids that do not rise by one; tokens [B, S, ...]."""
            batch_size, length = tokens.shape[:2]
            cache = kwargs.get("past_key_values")
            if kwargs.get("position_ids") is None and cache is not None:
                memory = VisualMemory.of(cache, self.config.get_text_config().num_hidden_layers)
                kwargs["position_ids"] = memory.following_positions(length)
            if cache is None and kwargs.get("attention_mask") is None and kwargs.get("sample_ids") is None:
                # without one transformers takes every jump of the ids for the start of another packed sample
                kwargs["attention_mask"] = torch.ones((batch_size, length), dtype=torch.int64, device=tokens.device)
            kwargs["compressed_positions"] = True
            return kwargs

        def visual_token_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
            """Which positions hold a visual token, bool [B, S]: from ids [B, S] or else embeddings [B, S, d]."""
            ids = torch.tensor([getattr(self.config, key) for key in visual_token_keys])
            if input_ids is not None:
                return torch.isin(input_ids, ids.to(input_ids.device))
            assert inputs_embeds is not None
            placeholders = self.get_input_embeddings()(ids.to(inputs_embeds.device))
            return (inputs_embeds[:, :, None] == placeholders).all(-1).any(-1)

    _register_key_conversion((base.__name__,), f"Surgeon{base.__name__}")  # as a checkpoint's own code names it
    return named_after(base, PatchedBaseModel)


@cache
def patched_model_class(
    base: Any, text_model: str, norm_placement: str, visual_token_keys: tuple[str, ...], *grafts: type[Graft]
) -> Any:
    """`base`, a model with a head, on a patched base model; arguments as `patched_base_model_class`, text_model from
    here."""
    prefix = base.base_model_prefix
    within = text_model.removeprefix(f"{prefix}.")
    kinds = {graft.kind: graft for graft in grafts}

    class Patched(Rebuilt, _WithGrafts, base):
        made_by = (patched_model_class, (base, text_model, norm_placement, visual_token_keys, *grafts))
        config_class = patched_config_class(base.config_class)

        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            base_model: Any = self.base_model
            plain: Any = type(base_model)
            graft_model(base_model, within, norm_placement, kinds)
            # the base model is built and grafted; only the methods of the patched class are missing
            base_model.__class__ = patched_base_model_class(plain, within, norm_placement, visual_token_keys, *grafts)
            self.post_init()

        @functools.wraps(base.generate)
        def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids") if inputs is None else inputs
            if ids is not None:
                visual = self.base_model.visual_token_mask(ids, None) if has_images(kwargs) else None
                kwargs = resolve_tiles(self.base_model, getattr(self.config, RECORD), visual, kwargs)
                if kwargs.get("past_key_values") is not None:
                    kwargs = drop_cached_images(self, ids, kwargs)
            return super().generate(inputs, *args, **kwargs)

        def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
            own = (*ROW_ALIGNED, "visual_token_mask")
            super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in own})

    Patched.__name__ = Patched.__qualname__ = f"Surgeon{base.__name__}"
    _register_key_conversions(base, Patched.__name__)
    return Patched


def _register_key_conversions(base: Any, name: str) -> None:
    """Checkpoints with an older layout of keys load into the patched class as they do into the plain one: transformers
    knows the layouts by the name of a class, or by a model_type. `name`: the patched class's."""
    model_type = base.config_class.model_type
    _register_key_conversion((base.__name__,), name)
    # a class of another name, as a checkpoint's own code has, is known by its model_type alone
    _register_key_conversion((model_type, base.__name__), MODEL_TYPE_PREFIX + model_type)


@cache
def _register_key_conversion(plain: tuple[str, ...], patched: str) -> None:
    """The first conversion that one of the plain names has becomes the patched one's too."""
    from transformers import conversion_mapping

    mappings = map(conversion_mapping.get_checkpoint_conversion_mapping, plain)
    mapping = next((mapping for mapping in mappings if mapping is not None), None)
    if mapping is not None:
        for each in mapping:
            _spare_inserted(each)
        conversion_mapping.register_checkpoint_conversion_mapping(patched, mapping, overwrite=True)


def _spare_inserted(conversion: Any) -> None:
    """Keep a renaming off the modules that a pass put into the base model, which no older layout of keys had: some take
    everything but the vision tower for the decoder's."""
    pattern = conversion.compiled_sources.pattern
    if "^" in pattern:
        conversion.compiled_sources = re.compile(rf"(?!(?:model\.)?(?:{'|'.join(INSERTED)})\.)(?:{pattern})")
