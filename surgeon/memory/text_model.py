"""The decoder of a patched model: pictures enter the request's memory, and the layers read it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from surgeon.memory.decoder_layer import entry_name
from surgeon.memory.graft import Graft, remember
from surgeon.memory.rotary import Rotary, position_axes
from surgeon.memory.tiled import Entering
from surgeon.memory.visual_memory import Entries, Reading, VisualMemory


@cache
def patched_text_model_class(base: type) -> type:
    class PatchedTextModel(base):
        """The decoder: lets visual embeddings enter the request's memory, and gives its layers what they read."""

        def forward(
            self,
            input_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            position_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            past_key_values: Cache | None = None,
            use_cache: bool | None = None,
            visual_token_mask: Tensor | None = None,
            memory_token_mask: Tensor | None = None,
            memory_embeds: Tensor | None = None,
            memory_embeds_mask: Tensor | None = None,
            memory_position_ids: Tensor | None = None,
            sample_ids: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            """As the base's, and: visual_token_mask bool [B, S]; memory_token_mask bool [B, S], which of them enter the
            memory, by default all; or memory_embeds [B, M, d] with mask and positions [B, M], which enter in their
            place; sample_ids int64 [B, S]: which of a row's packed samples each token belongs to."""
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids)
            use_cache = self.config.use_cache if use_cache is None else use_cache
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
            if past_key_values is None:
                memory = VisualMemory()
            else:
                memory = VisualMemory.of(past_key_values, self.config.num_hidden_layers)
            if sample_ids is not None and attention_mask is None:
                attention_mask = packed_mask(sample_ids, inputs_embeds.dtype)

            positions = self.token_positions(position_ids, inputs_embeds, past_key_values)
            if memory_embeds is not None:
                assert memory_position_ids is not None and memory_embeds_mask is not None
                entering = Entering(memory_embeds, memory_position_ids[None], memory_embeds_mask)
                self.enter(memory, entering)
            elif visual_token_mask is not None:
                enters = visual_token_mask if memory_token_mask is None else memory_token_mask[:, -positions.shape[2] :]
                if bool(enters.any()):
                    self.enter(memory, Entering.from_sequence(inputs_embeds, positions, enters, sample_ids))
            reading = None
            if memory.mask is not None:
                seen = memory.seen_by(sample_ids)
                reading = Reading(memory.entries, seen, visual_token_mask, self.rotary(positions))
            return super().forward(
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                reading=reading,
                **kwargs,
            )

        def token_positions(self, position_ids: Tensor | None, inputs_embeds: Tensor, cache: Cache | None) -> Tensor:
            """[A, B, S]: those given, or counted from the cache's length as the base does."""
            if position_ids is None:
                past = cache.get_seq_length() if cache is not None else 0
                position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past
            return position_axes(position_ids, inputs_embeds.shape[0])

        def grafts(self) -> dict[str, Graft]:
            """Every graft, by its name in the memory."""
            return {
                entry_name(layer, graft): graft
                for layer in self.layers
                for graft in layer.children()
                if isinstance(graft, Graft)
            }

        def rotary(self, position_ids: Tensor) -> dict[str, Rotary]:
            """The angles of positions [A, B, S] for each kind of graft with a `rope`, which its layers share."""
            ropes = {graft.kind: graft.rope for graft in self.grafts().values()}
            return {kind: rope(position_ids) for kind, rope in ropes.items() if rope is not None}

        def enter(self, memory: VisualMemory, entering: Entering) -> None:
            """Project what enters to keys and values [B, Hm, M, hd] of every graft, and append them to the memory."""
            rotary = self.rotary(entering.position_ids)
            entries: Entries = {
                name: remember(graft, entering.embeds, rotary.get(graft.kind)) for name, graft in self.grafts().items()
            }
            memory.extend(entries, entering.mask, entering.sample_ids)

    PatchedTextModel.__name__ = PatchedTextModel.__qualname__ = f"Patched{base.__name__}"
    return PatchedTextModel


def packed_mask(sample_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention mask of packed samples, additive [B, 1, S, S]: a token sees those before it in its own sample."""
    length = sample_ids.shape[1]
    causal = torch.ones((length, length), dtype=torch.bool, device=sample_ids.device).tril()
    seen = causal & (sample_ids[:, :, None] == sample_ids[:, None])
    blocked = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return blocked[:, None]
