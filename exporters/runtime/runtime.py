"""What every runtime does on the host: images and prompts in, logits out, token by token."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from exporters.onnx.manifest import PROCESSOR, Manifest
from exporters.onnx.rope import num_position_axes
from exporters.runtime.generate import answer
from exporters.runtime.invocation import former_shapes, invoke, nothing_remembered, remember, remember_prompt
from exporters.runtime.placement import ImageFeatures, MemoryInputs, Placement, padded
from exporters.runtime.state import State, Tokens, Wanted, rows_of, stack
from surgeon.errors import BundleError, CheckpointError, InputError, SurgeonError, TooLongError
from surgeon.families import Family, family
from surgeon.generation import Generation, OnText, Sampling
from surgeon.grafts import graft_records
from surgeon.inputs import Inputs, Message, ModelInputs, Prompt
from surgeon.json_file import read_object
from surgeon.memory.memory_tokens import Kind
from surgeon.memory.patched import MODEL_TYPE_PREFIX
from surgeon.memory.visibility import causally, visibility_of
from surgeon.memory_use import Mode, memory_settings, memory_tokens_of
from surgeon.models import read_config
from surgeon.positions import Positions, choose_positions, grid_in_sequence, position_ids, record_of

GraphName = Literal["vision", "embed", "memory", "decoder", "query_builder", "short_former", "long_former"]


class Runtime(ABC):
    """A model's four graphs, ready to run. It holds weights; what belongs to a request is in its `State`.

    What runs them says so in the methods under "what a backend does"; arrays are the host's, fp32 where they are
    floating, tensors the device's.
    """

    extra_outputs: tuple[str, ...] = ()

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """`manifest`: of the bundle. Raises BundleError where the processor's config in `path` cannot be read."""
        self.path, self.manifest = path, manifest
        self.family = family(manifest.source.model_type)
        self.config = _config(path / PROCESSOR / "config.json")
        _check_agreement(manifest, self.family, self.config)
        self.placement = Placement(self.config)
        self.max_length = manifest.max_length
        self.memory_tokens = memory_tokens_of(record_of(self.config))

    @cached_property
    def inputs(self) -> Inputs:
        """The tokenizer, chat template and image processor. Raises CheckpointError where one is missing."""
        return Inputs.from_directory(self.path / PROCESSOR, self.family)

    # -- what a backend does -----------------------------------------------------------------------------------
    @property
    @abstractmethod
    def device(self) -> str:
        """Where it computes, as torch names it."""

    @abstractmethod
    def takes(self, graph: GraphName) -> Collection[str]:
        """The names of a graph's inputs. What no layer of a model reads is not among them."""

    @abstractmethod
    def run(self, graph: GraphName, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | Tensor]:
        """Run vision, embed or memory; `feeds` may have more than it takes. What enters a memory stays on the device,
        as a tensor."""

    @abstractmethod
    def zeros(self, name: str, sizes: Mapping[str, int]) -> Tensor:
        """Zeros on the device, of the shape and dtype of the decoder's input; `sizes`: of its symbolic dimensions."""

    @abstractmethod
    def prefill(self, state: State, rows: slice, tokens: Tokens) -> np.ndarray:
        """Run the decoder over some rows of a state, whose caches are written in place; -> logits [B, T, V]."""

    @abstractmethod
    def decode(self, state: State, changing: dict[str, np.ndarray], fixed: dict[str, np.ndarray]) -> np.ndarray:
        """Run the decoder over one token of every row; `fixed` is the same in every step until `state.binding`, where
        a backend keeps what it prepared, is None again. -> logits [B, 1, V]."""

    def check_memory(self, slots: int) -> None:
        """Raise SurgeonError where a visual memory of so many slots a row does not fit."""

    # -- a request ---------------------------------------------------------------------------------------------
    def prepare(self, prompts: Sequence[Prompt | list[Message]], positions: Positions | None = None) -> ModelInputs:
        """Prompts or conversations as model inputs. `positions`: dhr or plain, for a model with RoPE-DHR, whose default
        is dhr. Raises InputError for what cannot be used."""
        return self.inputs.prepare(prompts, padding_side="right", positions=positions)

    def generate(
        self,
        prompts: Sequence[Prompt | list[Message]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        on_text: OnText | None = None,
        positions: Positions | None = None,
        memory: Mode | None = None,
        max_invocations: int | None = None,
    ) -> list[Generation]:
        """Answer prompts in one batch, as `exporters.generation.TextGenerator`. A row ends with one of the model's
        end-of-sequence tokens ("stop"), or after `max_new_tokens`, or when prompt and answer together are as long as
        the bundle's maximum (both "length"). Raises BundleError for a prompt that is longer than that."""
        settings = memory_settings(self.memory_tokens, memory, max_invocations)
        return answer(self, prompts, max_new_tokens, sampling, on_text, positions, settings)

    def encode_images(self, inputs: ModelInputs) -> list[list[ImageFeatures]]:
        """Each row's images, one call of the vision graph for each."""
        return [
            [self._encode(pixels, grid) for pixels, grid in zip(row_pixels, row_grids, strict=True)]
            for row_pixels, row_grids in zip(inputs.pixel_values, inputs.grids, strict=True)
        ]

    def _encode(self, pixel_values: np.ndarray, grid: tuple[int, int, int]) -> ImageFeatures:
        outputs = self.run("vision", self.family.vision_inputs(self.config, pixel_values, grid))
        return ImageFeatures(**outputs)  # type: ignore[arg-type]  # arrays: nothing of it stays on the device

    def start(self, inputs: ModelInputs, logits: Wanted = "last") -> tuple[State, np.ndarray]:
        """Begin a request: images, memory and prompts -> its state, and logits fp32 of each row's last token [B, V],
        or with `logits="all"` of every prompt position [B, S, V], S the longest row; what is behind a shorter row's
        end means nothing.

        Raises BundleError for a prompt that is longer than the bundle's maximum.
        """
        rows = rows_of(inputs)
        state = self._empty_state(len(rows))
        self.check_room(state, rows)
        tokens = self._tokens(state, inputs, rows, logits)
        prefill_logits = self.prefill(state, slice(None), tokens)
        state.advance(rows, tokens.position_ids)
        for row, ids in enumerate(rows if state.remembered else ()):
            remember_prompt(self, state, row, row, ids, tokens.visual_token_mask[row], inputs)
        return state, prefill_logits if logits == "all" else prefill_logits[:, 0]

    def step(self, state: State, tokens: np.ndarray, active: np.ndarray | None = None) -> np.ndarray:
        """Feed each row's next token, int64 [B] -> logits fp32 [B, V]. Rows that are not in `active` (bool [B]) stay as
        they are, and their logits mean nothing. Raises BundleError where an active row is full, InputError for tokens
        that are not the model's."""
        if np.shape(tokens) != (state.batch_size,):
            raise InputError(f"a step takes one token a row, [{state.batch_size}]; tokens are {list(np.shape(tokens))}")
        active = np.ones(state.batch_size, dtype=bool) if active is None else active
        if (state.lengths[active] >= self.max_length).any():
            raise TooLongError(f"a row has the bundle's maximum of {self.max_length} tokens; none can follow")
        changing = {
            "inputs_embeds": self.embed_tokens(np.where(active, tokens, 0).astype(np.int64)[:, None]),
            "position_ids": self.text_positions(state.next_positions[:, None]),
            # what an inactive row writes is overwritten by its next token, which a full row never has
            "write_indices": np.minimum(state.lengths, self.max_length - 1),
        }
        logits = self.decode(state, changing, self._fixed(state))
        state.lengths += active
        state.next_positions += active
        for row in np.flatnonzero(active).tolist() if state.remembered else ():
            remember(self, state, row, row, tokens[row : row + 1])
        return logits[:, 0]

    def invoke(self, state: State, row: int, kind: Kind) -> np.ndarray:
        """A row's last token called for memory: form it, and feed its latents and the end token -> logits fp32 [V] of
        what follows. Raises BundleError where the row has no room for it, InputError for short memory of a row whose
        images it would look at and that has none."""
        return invoke(self, state, row, kind)

    def append(self, state: State, inputs: ModelInputs, logits: Wanted = "last") -> np.ndarray:
        """Feed each row of a request further tokens, perhaps with new images: a later turn. `inputs` holds the new
        tokens and images alone. -> logits as from `start`.

        Images enter the memory beside those that are there, and positions continue. Raises BundleError for a row
        that would become longer than the bundle's maximum.
        """
        rows = rows_of(inputs)
        if len(rows) != state.batch_size:
            raise BundleError(f"the request has {state.batch_size} row(s), and append got {len(rows)}")
        self.check_room(state, rows)
        tokens = self._tokens(state, inputs, rows, logits)
        # Row by row: a batch's padding might not fit behind a long row, and ONNX Runtime's attention takes several new
        # tokens on a filled cache for one row at a time.
        row_logits, extra = [], []
        for row, ids in enumerate(rows):
            one = slice(row, row + 1)
            row_logits.append(self.prefill(state, one, tokens.of_row(row, len(ids), logits)))
            extra.append(state.extra)
            if state.remembered:
                remember_prompt(self, state, row, 0, ids, tokens.visual_token_mask[row], inputs)
        state.extra = {name: stack([row[name] for row in extra]) for name in self.extra_outputs}
        state.advance(rows, tokens.position_ids)
        stacked = stack(row_logits)
        return stacked if logits == "all" else stacked[:, 0]

    # -- inside ------------------------------------------------------------------------------------------------
    def _empty_state(self, batch_size: int) -> State:
        names, sizes = self.takes("decoder"), {"B": batch_size, "M": 1}
        return State(
            lengths=np.zeros(batch_size, dtype=np.int64),
            next_positions=np.zeros(batch_size, dtype=np.int64),
            caches={n: self.zeros(n, sizes) for n in names if n.startswith("past_")},
            memory={n: self.zeros(n, sizes) for n in names if n.startswith(_MEMORY)},
            memory_mask=np.zeros((batch_size, 1), dtype=bool),
            memory_places=np.zeros((batch_size, 1), dtype=np.int64),
            remembered=nothing_remembered(self.manifest, batch_size),
        )

    def check_room(self, state: State, rows: Sequence[np.ndarray]) -> None:
        for row, ids in enumerate(rows):
            length = int(state.lengths[row]) + len(ids)
            if length > self.max_length:
                raise TooLongError(
                    f"row {row} has {length} tokens, the bundle was exported for {self.max_length}: "
                    "shorten the prompt, scale its images down, or export again with a larger --max-length"
                )

    def _tokens(self, state: State, inputs: ModelInputs, rows: Sequence[np.ndarray], logits: Wanted) -> Tokens:
        """New tokens of all rows; their images are encoded, put in their places, and entered into the memory."""
        batch, length = len(rows), max(map(len, rows))
        input_ids = np.zeros((batch, length), dtype=np.int64)
        present = np.zeros((batch, length), dtype=np.int64)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)], present[row, : len(ids)] = ids, 1
        positions = choose_positions(self.config, inputs.positions)
        grids = [[grid_in_sequence(self.config, grid) for grid in row] for row in inputs.grids]
        token_positions, _ = position_ids(self.family, self.config, input_ids, present, grids, positions)
        token_positions = token_positions + state.next_positions[None, :, None]
        image_mask = (input_ids == self.family.image_token_id(self.config)) & (present == 1)
        embeds, deepstack = self.embed_tokens(input_ids), self.no_deepstack(batch, length)
        entering = []
        for row, images in enumerate(self.encode_images(inputs)):
            self._put(images, input_ids[row], embeds[row], None if deepstack is None else deepstack[:, row])
            places = state.lengths[row] + np.flatnonzero(image_mask[row])
            image_positions = token_positions[:, row, image_mask[row]]
            entering.append(self.placement.entering(images, inputs.grids[row], image_positions, places))
        if state.memory and any(entering):
            self._write_memory(state, entering)
        last = np.array([[len(ids) - 1] for ids in rows], dtype=np.int64)
        every = np.broadcast_to(np.arange(length), (batch, length))
        return Tokens(
            inputs_embeds=embeds,
            position_ids=token_positions,
            write_indices=state.lengths.copy(),
            logits_indices=every if logits == "all" else last,
            visual_token_mask=image_mask,
            deepstack=deepstack,
        )

    def _put(
        self, images: Sequence[ImageFeatures], input_ids: np.ndarray, embeds: np.ndarray, deepstack: np.ndarray | None
    ) -> None:
        """Put a row's images in the places of its ids [S]: embeds [S, d], deepstack [K, S, d], both in place."""
        if not images:
            return
        in_sequence = [self.placement.in_sequence(image) for image in images]
        image_mask = input_ids == self.family.image_token_id(self.config)
        embeds[image_mask] = np.concatenate([image.features for image in in_sequence])
        if in_sequence[0].indicators is not None:  # the same for every image
            ids = self.family.indicator_token_ids(self.config)
            for token_id, indicator in zip(ids, in_sequence[0].indicators, strict=True):
                embeds[input_ids == token_id] = indicator
        if deepstack is not None:
            deepstack[:, image_mask] = np.concatenate(
                [p.deepstack for p in in_sequence if p.deepstack is not None], axis=1
            )

    def _write_memory(self, state: State, entering: Sequence[MemoryInputs | None]) -> None:
        """Enter each row's visual embeddings into the memory, behind what is there."""
        embeds, position_ids, places, mask = padded(entering)
        behind = state.memory_mask.shape[1] if state.memory_mask.any() else 0
        self.check_memory(behind + mask.shape[1])
        # positions are read where a graft has a rope
        new = self.run("memory", {"visual_embeds": embeds, "media_position_ids": position_ids})
        state.write_memory(new, mask, places)  # type: ignore[arg-type]  # tensors: all of it stays on the device

    def memory_mask(self, state: State, rows: slice, tokens: Tokens) -> np.ndarray:
        """The decoder's `memory_mask` for new tokens of some rows: bool [B, M], or [B, S, M] where each token sees what
        stands at or before its own place."""
        mask = state.memory_mask[rows]
        if self.manifest.visibility == "all":
            return mask
        places = tokens.write_indices[:, None] + np.arange(tokens.inputs_embeds.shape[1])
        return causally(*map(torch.from_numpy, (mask, state.memory_places[rows], places))).numpy()

    def _fixed(self, state: State) -> dict[str, np.ndarray]:
        """What every decoding step of a state is fed alike."""
        batch = state.batch_size
        deepstack = self.no_deepstack(batch, 1)
        return {
            "logits_indices": np.zeros((batch, 1), dtype=np.int64),
            "visual_token_mask": np.zeros((batch, 1), dtype=bool),
            # every slot stands before a token that is generated
            "memory_mask": state.memory_mask if self.manifest.visibility == "all" else state.memory_mask[:, None],
            **({} if deepstack is None else {"deepstack": deepstack}),
        }

    def embed_tokens(self, input_ids: np.ndarray) -> np.ndarray:
        count = self.manifest.sizes.vocab_size
        if (unknown := input_ids[(input_ids < 0) | (input_ids >= count)]).size:
            raise InputError(f"token {unknown[0]} is not in the model's vocabulary of {count}")
        embeds = self.run("embed", {"input_ids": input_ids})["inputs_embeds"]
        return embeds  # type: ignore[return-value]  # an array: it does not stay on the device

    def no_deepstack(self, batch: int, length: int) -> np.ndarray | None:
        sizes = self.manifest.sizes
        if not sizes.deepstack:
            return None
        return np.zeros((sizes.deepstack, batch, length, sizes.hidden_size), dtype=np.float32)

    def text_positions(self, positions: np.ndarray) -> np.ndarray:
        return np.broadcast_to(positions, (self.manifest.sizes.position_axes, *positions.shape))


_MEMORY = ("memory_keys.", "memory_values.")


def _config(path: Path) -> PretrainedConfig:
    try:
        return read_config(read_object(path, CheckpointError))
    except SurgeonError as error:
        raise BundleError(f"{path} cannot be read ({error}): the bundle is damaged, export it again") from error


def _check_agreement(manifest: Manifest, model_family: Family, config: PretrainedConfig) -> None:
    """Raises BundleError where bundle.json and the processor's config.json are of different models."""
    text, record = model_family.text_config(config), record_of(config)
    sizes, tokens = manifest.sizes, manifest.tokens
    compared = {
        "source.model_type": (model_family.model_type, config.model_type.removeprefix(MODEL_TYPE_PREFIX)),
        "source.grafts": (manifest.source.grafts, graft_records(config)),
        "sizes.num_hidden_layers": (sizes.num_hidden_layers, text.num_hidden_layers),
        "sizes.num_key_value_heads": (sizes.num_key_value_heads, text.num_key_value_heads),
        "sizes.head_dim": (sizes.head_dim, model_family.head_dim(config)),
        "sizes.hidden_size": (sizes.hidden_size, text.hidden_size),
        "sizes.vocab_size": (sizes.vocab_size, text.vocab_size),
        "sizes.position_axes": (sizes.position_axes, num_position_axes(model_family, config)),
        "sizes.deepstack": (sizes.deepstack, model_family.deepstack_layers(config)),
        "tokens.image": (tokens.image, model_family.image_token_id(config)),
        "layout": (manifest.layout and manifest.layout.model_dump(), record.get("layout")),
        "positions": (manifest.positions and manifest.positions.model_dump(), record.get("positions")),
        "allocation": (manifest.allocation, record.get("allocation", "both")),
        "visibility": (manifest.visibility, visibility_of(record)),
        "vismem": (manifest.vismem and manifest.vismem.model_dump(), record.get("vismem")),
    }
    compared |= former_shapes(manifest)
    for key, (recorded, expected) in compared.items():
        if recorded != expected:
            raise BundleError(
                f"bundle.json says that {key} is {recorded}, and {PROCESSOR}/config.json {expected}: the bundle is "
                "damaged, export it again"
            )
