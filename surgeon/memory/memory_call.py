"""One call of the decoder of a model that calls for memory: latents take the places of their placeholders, and are
formed where the call holds invoke tokens."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from surgeon.memory.invoked_memory import Invocation, InvokedMemory
from surgeon.memory.memory_tokens import Kind, MemoryTokens
from surgeon.memory.towers._base import ImageInputs

Form = Callable[[Kind, Tensor, Tensor, Sequence[ImageInputs]], Tensor]
"""Kind, hidden states of images [V, d] and of text [T, d], and images of one row -> latents [N, d]."""


@dataclass
class MemoryCall:
    """What the base model knows of a call, for the decoder that is given embeddings."""

    tokens: MemoryTokens
    form: Form
    window: int
    """Tokens of text that a query is built of at most."""
    input_ids: Tensor
    """int64 [B, S]."""
    visual_token_mask: Tensor | None
    """bool [B, S]; None without images."""
    attention_mask: Any
    """[B, past + S], zero at padding; or which keys each token sees, [B, 1, S, at least past + S], as `generate` makes
    it for a static cache: bool, or zero where it does; or a dict of those, by kind of attention; or None."""
    images: Sequence[Sequence[ImageInputs]] | None
    """Each row's that come with the call."""
    _new: list[list[Invocation]] = field(default_factory=list)

    def run(self, decode: Callable[[Tensor], Any], inputs_embeds: Tensor, cache: Cache | None) -> Any:
        """The outputs of `decode`, the decoder over embeddings [B, S, d] and `cache`, with every latent in its place.

        A latent depends on the hidden states before it alone, so a call that holds invocations and what follows them
        is run once more for each that a row has; one step of decoding never is. Raises ValueError for a placeholder
        that no invocation is before.
        """
        memory = InvokedMemory.taken_from(cache)
        outputs = None
        try:
            memory.begin(len(inputs_embeds))
            if cache is not None and isinstance(past := cache.get_seq_length(), int) and past != memory.length:
                raise ValueError(
                    f"the cache holds {past} tokens and what is remembered of them is of {memory.length}: it was "
                    "filled by another model, or copied or cut without its memory, which is its last layer"
                )
            self._new = [[] for _ in inputs_embeds]
            ids = self.input_ids.tolist() if bool(self.tokens.is_one(self.input_ids).any()) else []
            self._check_can_run_again(ids, cache)
            seen = self._seen(slice(0, memory.length)) if ids or self.input_ids.shape[1] > 1 else None
            if seen is not None:
                memory.hide(~seen)  # a row that ended before the others was padded then, and says so only now
            while True:
                outputs = decode(self._with_latents(inputs_embeds, ids, memory))
                if not self._form(outputs.last_hidden_state, ids, memory):
                    break
                if cache is not None:
                    cache.crop(-inputs_embeds.shape[1])
            self._remember(outputs.last_hidden_state, memory)
        finally:
            kept = cache if outputs is None else outputs.past_key_values
            if kept is not None:
                kept.layers.append(memory)
        return outputs

    def _known(self, row: int, memory: InvokedMemory) -> tuple[Invocation, ...]:
        return (*memory.invocations[row], *self._new[row])

    def _with_latents(self, inputs_embeds: Tensor, ids: Sequence[Sequence[int]], memory: InvokedMemory) -> Tensor:
        """The embeddings with every latent that has been formed in the place of its placeholder."""
        rows, columns, latents = [], [], []
        for row, own in enumerate(ids):
            by_place = {each.place: each for each in self._known(row, memory)}
            current = memory.invocations[row][-1] if memory.invocations[row] else None
            for column, token in enumerate(own):
                place = memory.length + column
                if self.tokens.kind_of(token) is not None:
                    if place not in by_place:
                        break  # it is formed of this call, and what follows it is run once more
                    current = by_place[place]
                if token != self.tokens.placeholder:
                    if token not in self.tokens.invoke.values():
                        current = None
                    continue
                k = -1 if current is None else place - current.place - 1
                if current is None or k >= len(current.latents):
                    raise ValueError(
                        f"row {row} has a placeholder at column {place} that no invocation is for: an invoke token is "
                        "followed by as many as its memory has latents, and by its end token"
                    )
                rows.append(row)
                columns.append(column)
                latents.append(current.latents[k])
        if not rows:
            return inputs_embeds
        index = torch.tensor(rows, device=inputs_embeds.device), torch.tensor(columns, device=inputs_embeds.device)
        return inputs_embeds.index_put(index, torch.stack(latents).to(inputs_embeds))

    def _form(self, hidden_states: Tensor, ids: Sequence[Sequence[int]], memory: InvokedMemory) -> bool:
        """Form the first memory of each row that has not been formed; -> whether its placeholders are in this call."""
        again = False
        for row, own in enumerate(ids):
            for column, token in enumerate(own):
                kind = self.tokens.kind_of(token)
                place = memory.length + column
                if kind is None or any(each.place == place for each in self._new[row]):
                    continue
                self._new[row].append(self._invocation(kind, row, column, hidden_states[row], memory))
                again = again or column + 1 < len(own)
                break
        return again

    def _invocation(
        self, kind: Kind, row: int, column: int, hidden_states: Tensor, memory: InvokedMemory
    ) -> Invocation:
        """The memory that the token at `column` calls for; hidden_states [S, d], the row's in this call."""
        start, place = time.perf_counter(), memory.length + column
        since = self._since(row, memory)
        until = slice(0, column + 1)
        columns = torch.arange(memory.length, place + 1, device=hidden_states.device)
        is_text = self._is_text(memory.length)[row, until]
        said = [*memory.said(row, since), hidden_states[until][is_text & (columns >= since)]]
        seen = memory.seen(row)
        if self.visual_token_mask is not None:
            if bool(self.visual_token_mask[row, column + 1 :].any()):
                raise ValueError(
                    f"row {row} calls for memory before an image of the same call: feed the conversation turn by turn, "
                    "with a cache"
                )
            seen.append(hidden_states[until][self.visual_token_mask[row, until]])
        images = [*memory.images[row], *(self.images[row] if self.images is not None else ())]
        empty = hidden_states[:0]
        latents = self.form(kind, torch.cat((empty, *seen)), torch.cat((empty, *said))[-self.window :], images)
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        return Invocation(place, kind, latents, time.perf_counter() - start)

    def _since(self, row: int, memory: InvokedMemory) -> int:
        """The column of the last end token, or the first of all."""
        known = self._known(row, memory)
        return known[-1].place + len(known[-1].latents) + 1 if known else 0

    def _is_text(self, past: int) -> Tensor:
        """Which tokens of the call count as said: neither visual nor padding nor placeholders, bool [B, S].
        past: how many columns were before it."""
        is_text = self.input_ids != self.tokens.placeholder
        if self.visual_token_mask is not None:
            is_text = is_text & ~self.visual_token_mask
        seen = self._seen(slice(past, past + is_text.shape[1]))
        return is_text if seen is None else is_text & seen

    def _seen(self, columns: slice) -> Tensor | None:
        """Which of the sequence's columns are no padding, bool [B, n]; None where the call does not say."""
        mask: Any = self.attention_mask
        if isinstance(mask, dict):  # padding is the same in all
            mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is None:
            return None
        if mask.ndim == 2:
            return mask[:, columns].bool() if mask.shape[1] >= columns.stop else None
        seen = mask[:, 0, -1, columns]  # what the last token does not see is padding
        return seen if seen.dtype == torch.bool else seen == 0

    def _check_can_run_again(self, ids: Sequence[Sequence[int]], cache: Cache | None) -> None:
        """Raises ValueError where a call holds an invocation and what follows it, and its cache cannot be cut back."""
        invoke = self.tokens.invoke.values()
        within = any(token in invoke for own in ids for token in own[:-1])
        if within and cache is not None and not all(hasattr(layer, "crop") for layer in cache.layers):
            raise ValueError(
                "a static cache cannot be cut back, so a call may not hold an invocation and what follows it: feed the "
                "tokens up to each invoke token by themselves, or use a dynamic cache"
            )

    def _remember(self, hidden_states: Tensor, memory: InvokedMemory) -> None:
        for row, images in enumerate(self.images or ()):
            memory.images[row] = (*memory.images[row], *images)
            memory.image_places[row] = (*memory.image_places[row], *[memory.length] * len(images))
        for row, new in enumerate(self._new):
            memory.invocations[row] = (*memory.invocations[row], *new)
        memory.add(hidden_states, self._is_text(memory.length), self.visual_token_mask, self.window)
