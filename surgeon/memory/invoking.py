"""A patched model that calls for memory: patched classes over which three more are laid, one for each of theirs.

The base model knows ids and images, and has the modules that form memory; the decoder is given what it knows as a
`MemoryCall`; the model with a head generates, with memory tokens where they belong.
"""

import functools
import inspect
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig

from surgeon.memory.inserted import Inserted
from surgeon.memory.invoked_memory import InvokedMemory
from surgeon.memory.invoking_generation import InvokingGeneration
from surgeon.memory.memory_call import MemoryCall
from surgeon.memory.memory_tokens import MemoryTokens
from surgeon.memory.patched import RECORD, patched_base_model_class, patched_model_class
from surgeon.memory.pickled import named_after
from surgeon.memory.text_model import patched_text_model_class
from surgeon.memory.tiled import has_images
from surgeon.memory.towers._base import ImageInputs, Tower
from surgeon.memory.visibility import Visibility
from surgeon.memory.vismem import Lent, VisMem

IMAGES, IMAGE_ROWS = "memory_images", "memory_image_rows"
"""What `generate` hands to the first call: each row's images, and which of them each row of the batch has, int64 [B];
transformers takes the pixels out of its keywords, and repeats rows of tensors alone."""


@cache
def invoking_text_model_class(base: Any, visibility: Visibility) -> Any:
    """`patched_text_model_class` of a model that calls for memory."""
    patched: Any = patched_text_model_class(base, visibility)

    class InvokingTextModel(patched):
        made_by = (invoking_text_model_class, (base, visibility))

        def forward(
            self,
            input_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            past_key_values: Cache | None = None,
            memory_call: MemoryCall | None = None,
            **kwargs: Any,
        ) -> Any:
            """As the base's; memory_call: what the base model knows of the call. Raises ValueError without it."""
            if memory_call is None:
                raise ValueError(
                    "the decoder was called past its base model, so nobody knows where memory is called for: call the "
                    "model, or model.base_model; where a library replaced their forward, turn that off"
                )
            if kwargs.get("sample_ids") is not None:
                raise ValueError("a model that calls for memory takes one sample a row: turn packing off")
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids)

            def decode(embeds: Tensor) -> Any:
                return super(InvokingTextModel, self).forward(
                    inputs_embeds=embeds, past_key_values=past_key_values, **kwargs
                )

            return memory_call.run(decode, inputs_embeds, past_key_values)

    return named_after(base, InvokingTextModel)


class _WithVisMem:
    """What an invoking model and its base model share."""

    config: Any

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, Inserted):
            module.reset_parameters(self.config.get_text_config().initializer_range)
        else:
            super()._init_weights(module)  # type: ignore[misc]  # of the class behind


def add_vismem(base_model: Any, text_model: str, tower: type[Tower] | None) -> None:
    """Give a patched base model the modules that form memory, by its config's record, in place. text_model: the
    decoder's path within it."""
    decoder = base_model.get_submodule(text_model)
    record = getattr(base_model.config, RECORD)["vismem"]
    base_model.add_module(VisMem.kind, VisMem.of(base_model, decoder, record, tower))
    patched: Any = type(decoder)
    decoder.__class__ = invoking_text_model_class(*patched.made_by[1])


def images_by_row(
    base_model: Any,
    tower: type[Tower] | None,
    kwargs: dict[str, Any],
    visual_token_mask: Tensor,
    input_ids: Tensor | None,
) -> list[list[ImageInputs]] | None:
    """Each row's images of a call with pixel values; None where no former looks at them. None looks at a video: a row
    that has no other image calls for long memory alone. input_ids [B, S], those of visual_token_mask."""
    if tower is None or kwargs.get("pixel_values") is None:
        return None
    if kwargs.get("pixel_values_videos") is not None:
        if input_ids is None:
            return None
        visual_token_mask = visual_token_mask & (input_ids == base_model.config.image_token_id)
        kwargs = {name: value for name, value in kwargs.items() if name != "pixel_values_videos"}
    return tower.images_by_row(base_model, kwargs, visual_token_mask)


@cache
def invoking_base_model_class(
    base: Any, text_model: str, norm_placement: str, keys: tuple[str, ...], *parts: Any
) -> Any:
    """`patched_base_model_class` of a model that calls for memory. `parts`: its grafts' classes, and the tower that its
    short former looks through, where it has one."""
    tower, grafts = _apart(parts)
    patched: Any = patched_base_model_class(base, text_model, norm_placement, keys, *grafts)
    parameters = [name for name in inspect.signature(base.forward).parameters if name != "self"]

    class InvokingBaseModel(_WithVisMem, patched):
        made_by = (invoking_base_model_class, (base, text_model, norm_placement, keys, *parts))

        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            add_vismem(self, text_model, tower)
            self.post_init()

        @functools.wraps(patched.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """As the patched model's; ids that hold memory tokens have latents in their placeholders' places."""
            kwargs |= dict(zip(parameters, args, strict=False))
            images, rows = kwargs.pop(IMAGES, None), kwargs.pop(IMAGE_ROWS, None)
            ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
            with_images = has_images(kwargs)
            visual = kwargs.get("visual_token_mask")
            if visual is None and with_images:
                visual = self.visual_token_mask(ids, embeds)
            visual = visual if with_images or ids is None else None
            if not with_images:
                images = None
            elif images is not None:
                images = [images[row] for row in rows.tolist()]
            elif visual is not None:
                images = images_by_row(self, tower, kwargs, visual, ids)
            if ids is None:  # embeddings alone are of text and images, no memory token is among them
                assert embeds is not None
                ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
            call = MemoryCall(
                tokens=MemoryTokens.of(getattr(self.config, RECORD)["vismem"]),
                form=functools.partial(self.vismem, Lent(self), Lent(self.get_submodule(text_model))),
                window=self.vismem.window,
                input_ids=ids,
                visual_token_mask=visual,
                attention_mask=kwargs.get("attention_mask"),
                images=images,
            )
            return super().forward(**kwargs, memory_call=call)

    return named_after(base, InvokingBaseModel)


@cache
def invoking_model_class(base: Any, text_model: str, norm_placement: str, keys: tuple[str, ...], *parts: Any) -> Any:
    """`patched_model_class` of a model that calls for memory; arguments as `invoking_base_model_class`, text_model from
    here."""
    tower, grafts = _apart(parts)
    patched: Any = patched_model_class(base, text_model, norm_placement, keys, *grafts)
    within = text_model.removeprefix(f"{base.base_model_prefix}.")

    class Invoking(InvokingGeneration, _WithVisMem, patched):
        made_by = (invoking_model_class, (base, text_model, norm_placement, keys, *parts))

        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            base_model: Any = self.base_model
            add_vismem(base_model, within, tower)
            plain = type(base_model).made_by[1][0]
            base_model.__class__ = invoking_base_model_class(plain, within, norm_placement, keys, *parts)
            self.post_init()

        @property
        def memory_tokens(self) -> MemoryTokens:  # type: ignore[override]  # it is only read
            return MemoryTokens.of(getattr(self.config, RECORD)["vismem"])

        def _prepare_model_inputs(self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> Any:
            tensor, name, kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
            if name == "input_ids" and has_images(kwargs):
                cache = kwargs.get("past_key_values")
                past_length = 0 if cache is None else int(cache.get_seq_length())
                visual = self.base_model.visual_token_mask(tensor, None)[:, past_length:]
                kwargs[IMAGES] = images_by_row(self.base_model, tower, kwargs, visual, tensor[:, past_length:])
                kwargs[IMAGE_ROWS] = torch.arange(len(tensor), device=tensor.device)
            return tensor, name, kwargs

        def rows_without_images(self, kwargs: dict[str, Any]) -> Tensor | None:
            if tower is None:
                return None
            cache = kwargs.get("past_key_values")
            memory = None if cache is None else InvokedMemory.of(cache)
            earlier = [] if memory is None else [bool(images) for images in memory.images]
            rows = kwargs.get(IMAGE_ROWS)
            images = kwargs.get(IMAGES)
            new = [] if rows is None or images is None else [bool(images[row]) for row in rows.tolist()]
            if not earlier and not new:
                return torch.tensor([True])
            sees = [any(pair) for pair in zip_longest(earlier, new, fillvalue=False)]
            return ~torch.tensor(sees)

    Invoking.__name__ = Invoking.__qualname__ = patched.__name__
    return Invoking


def _apart(parts: tuple[Any, ...]) -> tuple[type[Tower] | None, list[Any]]:
    """The tower, and the grafts."""
    towers = [part for part in parts if issubclass(part, Tower)]
    return (towers[0] if towers else None), [part for part in parts if not issubclass(part, Tower)]
