"""The decoder of a patched model: images enter the request's memory, and the layers read it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache

from surgeon.memory.pickled import Rebuilt, named_after
from surgeon.memory.reading import Reading
from surgeon.memory.rotary import Rotary, split_axes
from surgeon.memory.slots import Entering, Slots, token_places_if
from surgeon.memory.visibility import Visibility
from surgeon.memory.visual_memory import VisualMemory


@cache
def patched_text_model_class(base: type, visibility: Visibility) -> type:
    """`base`, whose tokens see images in the memory as `visibility` says."""

    class PatchedTextModel(Rebuilt, base):
        """The decoder: lets visual embeddings enter the request's memory, and gives its layers what they read."""

        made_by = (patched_text_model_class, (base, visibility))

        def forward(
            self,
            input_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            position_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            past_key_values: Cache | None = None,
            use_cache: bool | None = None,
            has_images: bool | None = None,
            visual_token_mask: Tensor | None = None,
            memory_token_mask: Tensor | None = None,
            memory_embeds: Tensor | None = None,
            memory_embeds_mask: Tensor | None = None,
            memory_position_ids: Tensor | None = None,
            memory_places: Tensor | None = None,
            sample_ids: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            """As the base's, and: visual_token_mask bool [B, S], or has_images=False with embeddings that are text
            alone; memory_token_mask bool [B, S], which visual tokens enter the memory, by default all; or memory_embeds
            [B, M, d] with mask, positions and places (counted from this call's first token) [B, M], which enter in
            their place; sample_ids int64 [B, S]: which of a row's packed samples each token belongs to. Without them,
            position ids that start again say so, as they do to transformers, where neither a mask nor a cache is
            passed.

            Raises ValueError where embeddings come from elsewhere than the patched base model, so that nobody knows
            whether images are among them.
            """
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids)
            elif has_images is None and visual_token_mask is None:
                raise ValueError(
                    "embeddings reached the decoder past the patched base model, so images among them could not "
                    "enter the memory: call the model, or model.base_model; where a library replaced their forward, "
                    "turn that off"
                )
            alone = past_key_values is None
            use_cache = self.config.use_cache if use_cache is None else use_cache
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
            if past_key_values is None:
                memory, past_length = VisualMemory(), 0
            else:
                memory = VisualMemory.of(past_key_values, self.config.num_hidden_layers)
                past_length = past_key_values.get_seq_length()
            # under torch.compile and in static caches lengths may be tensors, which are not waited for
            if isinstance(past_length, int) and isinstance(memory.length, int) and memory.length != past_length:
                raise ValueError(
                    f"the cache holds {past_length} tokens and its visual memory was made for {memory.length}: it was "
                    "filled by another model, or copied or cut without its memory, which is its last layer"
                )
            if sample_ids is not None and past_length:
                raise ValueError("sample_ids are of samples that are packed into one call: pass no past_key_values")
            if sample_ids is None and alone and attention_mask is None and not kwargs.get("compressed_positions"):
                sample_ids = restarts(position_ids, inputs_embeds.shape[0])
            if sample_ids is not None and (attention_mask is None or attention_mask.ndim == 2):
                attention_mask = packed_mask(sample_ids, attention_mask, inputs_embeds.dtype)

            places = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            positions = split_axes(places if position_ids is None else position_ids, inputs_embeds.shape[0])
            entering = None
            if memory_embeds is not None:
                assert memory_position_ids is not None and memory_embeds_mask is not None and memory_places is not None
                memory_slots = Slots(memory_embeds_mask, memory_places + past_length)
                entering = Entering(memory_embeds, memory_position_ids[None], memory_slots)
            elif visual_token_mask is not None:
                length = positions.shape[2]
                enters = visual_token_mask
                if memory_token_mask is not None:  # of the prompt, which a generation without a cache repeats, longer
                    enters = pad(memory_token_mask[:, -length:], (0, max(0, length - memory_token_mask.shape[1])))
                if bool(enters.any()):
                    entering = Entering.from_sequence(inputs_embeds, positions, places, enters, sample_ids)

            changes = entering is not None
            slots = memory.slots
            if slots is None and entering is None and self.training and torch.is_grad_enabled():
                entering = Entering.nothing(inputs_embeds)
            if entering is not None:
                slots = entering.slots if slots is None else slots.followed_by(entering.slots)
            reading = None
            if slots is not None:
                reading = Reading(
                    entries=memory.entries,
                    mask=slots.seen_by(token_places_if(visibility, places, entering), sample_ids),
                    visual_token_mask=visual_token_mask,
                    rotary=rotary(self, positions),
                    entering=None if entering is None else entering.embeds,
                    entering_rotary={} if entering is None else rotary(self, entering.position_ids),
                )
            outputs = super().forward(
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                reading=reading,
                **kwargs,
            )
            memory.length = past_length + inputs_embeds.shape[1]
            if changes and slots is not None and reading is not None:
                memory.keep(dict(reading.joined), slots)
            if kwargs.get("compressed_positions") and position_ids is not None:
                memory.continue_positions(position_ids, past_length)
            return outputs

    return named_after(base, PatchedTextModel)


def rotary(decoder: Any, position_ids: Tensor) -> dict[str, Rotary]:
    """The angles of positions [A, B, S] for each kind of graft with a `rope`, which its layers share."""
    ropes = {kind: getattr(layer, kind).rope for layer in decoder.layers for kind in layer.graft_sites}
    return {kind: rope(position_ids) for kind, rope in ropes.items() if rope is not None}


def restarts(position_ids: Tensor | None, batch_size: int) -> Tensor | None:
    """The samples of rows whose text positions, [B, S] or the first of [4, B, S], do not rise by one from token to
    token: int64 [B, S], counted up at each such place; None where there is none."""
    if position_ids is None or position_ids.ndim not in (2, 3) or (position_ids.ndim == 3 and len(position_ids) != 4):
        return None
    text = position_ids if position_ids.ndim == 2 else position_ids[0]
    samples: Tensor = (text.diff(dim=-1, prepend=text[:, :1] - 1) != 1).cumsum(-1)
    return samples.expand(batch_size, -1) if bool(samples.any()) else None


def packed_mask(sample_ids: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The attention mask of packed samples, additive [B, 1, S, S]: a token sees those before it in its own sample,
    but for padding, where attention_mask [B, S] is zero."""
    length = sample_ids.shape[1]
    causal = torch.ones((length, length), dtype=torch.bool, device=sample_ids.device).tril()
    visible = causal & (sample_ids[:, :, None] == sample_ids[:, None])
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None]
    blocked = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
        ~visible, torch.finfo(dtype).min
    )
    return blocked[:, None]
