"""Images and prompts as model inputs, the same for torch and for bundles: what transformers' processor would give.

The processor class itself is not used, because it cannot be made without torchvision (it insists on a video
processor). Its parts are: the image processor, the tokenizer, the chat template and the family's placeholders. Where it
can be made, the validator compares with it (`surgeon/parity/processor.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, PretrainedConfig

from surgeon import rendering
from surgeon.errors import CheckpointError, InputError
from surgeon.families import Family, Grid
from surgeon.families import family as find_family
from surgeon.images import ImageSource, load_image
from surgeon.json_file import read_object
from surgeon.memory_use import memory_tokens_of
from surgeon.models import read_config
from surgeon.positions import Positions, choose_positions, grid_in_sequence, record_of
from surgeon.side_files import IMAGE_PROCESSOR_FILES, TOKENIZER_FILES
from surgeon.sizes import GenerationTokens, check, one_line
from surgeon.tokenizer_files import load_tokenizer

Message = dict[str, Any]
Side = Literal["left", "right"]

IMAGE_BACKEND = "pil"
"""What transformers' image processors compute with. By default they take torchvision where it is installed, whose
pixels are slightly other ones: the same image would be another question from machine to machine."""


@dataclass(frozen=True)
class Prompt:
    """One turn of a user: images first, then the text."""

    text: str
    images: tuple[ImageSource, ...] = ()
    system: str | None = None

    def messages(self) -> list[Message]:
        """The prompt as a conversation: messages whose content is a list of images and texts."""
        system = [] if self.system is None else [{"role": "system", "content": [{"type": "text", "text": self.system}]}]
        images: list[Message] = [{"type": "image", "image": image} for image in self.images]
        return [*system, {"role": "user", "content": [*images, {"type": "text", "text": self.text}]}]


@dataclass(frozen=True)
class ModelInputs:
    """A batch of prompts. `input_ids`, `attention_mask` and `mm_token_type_ids` (1 at image tokens) are int64 [B, S];
    `pixel_values` (fp32 patches or tiles) and `grids` are per row and image."""

    family: Family
    input_ids: np.ndarray
    attention_mask: np.ndarray
    mm_token_type_ids: np.ndarray
    pixel_values: list[list[np.ndarray]]
    grids: list[list[Grid]]
    positions: Positions | None = None
    """Where the checkpoint offers RoPE-DHR, whether this request uses it."""
    needs_tile_grids: bool = False
    """Whether the model needs `tile_grids`, the tiles of each image."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row without its padding, int64 [B]."""
        lengths: np.ndarray = self.attention_mask.sum(1)
        return lengths

    def model_kwargs(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The keywords of a transformers model's forward or generate; the images' are absent where there is none."""
        arrays: dict[str, np.ndarray] = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
        }
        if self.family.token_types:
            arrays["mm_token_type_ids"] = self.mm_token_type_ids
        grids = list(chain.from_iterable(self.grids))
        if grids:
            arrays |= self.family.model_kwargs(self.pixel_values, self.grids)
            if self.needs_tile_grids:
                arrays["tile_grids"] = np.array([grid[1:] for grid in grids], dtype=np.int64)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        kwargs = {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in tensors.items()}
        return kwargs if self.positions is None else {**kwargs, "positions": self.positions}


def image_processor_of(path: Path, config: PretrainedConfig) -> Any:
    """transformers' image processor of a directory, the same on every machine. `config`: of the family, for settings
    that do not name it. Raises what transformers raises."""
    return AutoImageProcessor.from_pretrained(path, config=config, trust_remote_code=False, backend=IMAGE_BACKEND)


class Inputs:
    """A checkpoint's (or bundle's) tokenizer, chat template and image processor."""

    def __init__(
        self,
        family: Family,
        config: PretrainedConfig,
        tokenizer: Any,
        image_processor: Any,
        chat_template: str | None = None,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        self.family = family
        self.config = config
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template = chat_template
        self.image_token = family.placeholder(config, tokenizer)
        self.generation_config = generation_config or {}

    @classmethod
    def from_directory(cls, path: Path | str, family: Family | None = None) -> "Inputs":
        """Read a directory with config.json, tokenizer and image processor; code in it is never run.

        Raises CheckpointError where a part is missing, FamilyError for an unsupported model_type.
        """
        path = Path(path)
        config_dict = _read_json(path / "config.json")
        if config_dict is None:
            raise CheckpointError(f"{path} has no config.json: pass the directory of a checkpoint or bundle")
        # a patched checkpoint's own model_type is unknown to transformers; its inputs are the family's
        config = read_config(config_dict, plain=True)
        if family is not None and family.model_type != config.model_type:
            raise CheckpointError(
                f"{path / 'config.json'} is of a {config.model_type}, another model's: expected {family.model_type}"
            )
        _require(path, {"tokenizer": TOKENIZER_FILES, "image processor": IMAGE_PROCESSOR_FILES})
        rendering.start()
        tokenizer = load_tokenizer(path, config)
        image_processor = _load("image processor", path, partial(image_processor_of, config=config))
        described = find_family(config.model_type)
        described.check_image_processor(config, image_processor)
        # as the processor does: the older file, where there is one, goes before the tokenizer's own template
        template = (_read_json(path / "chat_template.json") or {}).get("chat_template")
        if template is None and not tokenizer.chat_template:
            raise CheckpointError(f"{path} has no chat template: copy chat_template.jinja from the model's source")
        generation_config = _read_json(path / "generation_config.json") or {}
        check(GenerationTokens, generation_config, file="generation_config.json")
        return cls(described, config, tokenizer, image_processor, template, generation_config)

    # -- preparing ---------------------------------------------------------------------------------------------
    def prepare(
        self,
        prompts: Sequence[Prompt | list[Message]],
        padding_side: Side = "left",
        add_generation_prompt: bool = True,
        positions: Positions | None = None,
    ) -> ModelInputs:
        """A batch of prompts, or of conversations as lists of messages. `positions`: dhr or plain, for a checkpoint
        with RoPE-DHR, whose default is dhr. Raises InputError for what cannot be used."""
        chosen_positions = choose_positions(self.config, positions)
        if not prompts:
            raise InputError("there is no prompt: pass at least one")
        rows, pixel_values, grids = [], [], []
        for prompt in prompts:
            messages = prompt.messages() if isinstance(prompt, Prompt) else prompt
            images, messages = _take_images(messages)
            processed = [self.process_image(image, alone=len(images) == 1) for image in images]
            grids.append([grid for _, grid in processed])
            pixel_values.append([pixels for pixels, _ in processed])
            text = self.render(messages, add_generation_prompt)
            rows.append(self.tokenize(text, [grid_in_sequence(self.config, grid) for grid in grids[-1]]))
        length = max(map(len, rows))
        input_ids = np.full((len(rows), length), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for i, ids in enumerate(rows):
            span = slice(length - len(ids), None) if padding_side == "left" else slice(len(ids))
            input_ids[i, span], attention_mask[i, span] = ids, 1
        image_mask = (input_ids == self.family.image_token_id(self.config)) & (attention_mask == 1)
        return ModelInputs(
            family=self.family,
            input_ids=input_ids,
            attention_mask=attention_mask,
            mm_token_type_ids=image_mask.astype(np.int64),
            pixel_values=pixel_values,
            grids=grids,
            positions=chosen_positions,
            needs_tile_grids="layout" in record_of(self.config),
        )

    def process_image(self, source: ImageSource, alone: bool = True) -> tuple[np.ndarray, Grid]:
        """One image's pixel values, fp32, and its grid, both as the family has them. `alone`: no other image is in
        its prompt, which matters to some families."""
        image = load_image(source)
        try:
            return self.family.process_image(self.config, self.image_processor, image, alone)
        except (ValueError, InputError) as error:  # a shape it does not take
            name = source if isinstance(source, Path | str) else f"of {image.width} x {image.height} pixels"
            raise InputError(f"image {name} cannot be used: {error}") from None

    def render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        """The chat template's text, with one placeholder for each image."""
        template = self.template()
        # as transformers gives them to a template: what is None is left out
        template_messages = [
            {key: value for key, value in message.items() if value is not None} for message in messages
        ]
        variables = {**self.tokenizer.special_tokens_map, "add_generation_prompt": add_generation_prompt}
        return rendering.render(template, template_messages, variables)

    def template(self) -> str:
        """The chat template in use. Raises CheckpointError where there are several and none is to be chosen."""
        try:
            template: str = self.tokenizer.get_chat_template(self.chat_template)
        except ValueError as error:
            raise CheckpointError(f"there is no chat template to choose: {one_line(error)}") from None
        return template

    def tokenize(self, text: str, grids: Sequence[Grid]) -> list[int]:
        """Token ids of rendered text, each placeholder expanded to its image's tokens."""
        parts = text.split(self.image_token)
        if len(parts) - 1 != len(grids):
            raise InputError(
                f"the prompt has {len(parts) - 1} image placeholder(s) {self.image_token} for {len(grids)} image(s): "
                "give each image as an image and leave the placeholder out of the text"
            )
        expanded = [self.family.expand_placeholder(self.config, grid, self.tokenizer) for grid in grids]
        text = parts[0] + "".join(chain.from_iterable(zip(expanded, parts[1:], strict=True)))
        starts_itself = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        ids = self._encode(text, add_special_tokens=not starts_itself)
        image = self.family.image_token_id(self.config)
        if ids.count(image) != sum(self.family.image_tokens(self.config, grid) for grid in grids):
            token = self.tokenizer.convert_ids_to_tokens(image)
            raise InputError(f"the prompt's text has image tokens {token}: give each image as an image instead")
        memory = memory_tokens_of(record_of(self.config))
        if memory is not None and (spelt := set(memory.ids).intersection(ids)):
            token = self.tokenizer.convert_ids_to_tokens(min(spelt))
            raise InputError(
                f"the prompt's text spells the memory token {token}, which the model alone may use: leave it out"
            )
        other = set(self.family.visual_token_ids(self.config)) - {image}
        if other.intersection(ids):
            raise InputError("the prompt has video tokens: video is not supported yet, pass images")
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                "the prompt is not valid Unicode text: was it typed in another encoding than the terminal's?"
            ) from error
        try:
            ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except Exception as error:  # all of it is transformers' own, which takes any text: what is left is its settings
            raise CheckpointError(
                f"the tokenizer does not work as its files set it: {type(error).__name__}: {one_line(error)}; copy "
                "tokenizer.json and tokenizer_config.json from the model's source"
            ) from error
        return ids

    # -- tokens ------------------------------------------------------------------------------------------------
    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """The text of one row's ids."""
        text = self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        return str(text)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a generation: those of generation_config.json, else of the config, else the tokenizer's."""
        text = self.family.text_config(self.config)
        candidates = (
            self.generation_config.get("eos_token_id"),
            getattr(text, "eos_token_id", None),
            getattr(self.config, "eos_token_id", None),
            self.tokenizer.eos_token_id,
        )
        for token_ids in candidates:
            if token_ids is not None:
                return tuple(token_ids) if isinstance(token_ids, list | tuple) else (int(token_ids),)
        return ()

    @property
    def pad_token_id(self) -> int:
        """The id that rows are padded with."""
        for token_id in (self.tokenizer.pad_token_id, self.generation_config.get("pad_token_id"), *self.eos_token_ids):
            if token_id is not None:
                return int(token_id)
        return 0


_VIDEO_PARTS = ("video", "video_url", "input_video")


def _take_images(messages: list[Message]) -> tuple[list[ImageSource], list[Message]]:
    """A conversation's images in order, and the conversation with only their places left in it."""
    images: list[ImageSource] = []
    bare: list[Message] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = [_take_image(item, images) for item in content]
        bare.append({**message, "content": content})
    return images, bare


def _take_image(item: Message, images: list[ImageSource]) -> Message:
    if not isinstance(item, dict):
        raise InputError(f"a part of the conversation is {item!r:.80}: write {{'type': 'text', 'text': ...}}")
    kind = item.get("type", next((key for key in ("text", "image", "video") if key in item), None))
    if kind in _VIDEO_PARTS or "video" in item:
        raise InputError("the conversation has a video: video is not supported yet, pass images")
    if kind != "image" and "image" not in item:
        if kind != "text":  # a chat template drops what it does not know without a word
            raise InputError(f"the conversation has a part of type {kind!r}: write it as 'text' or 'image'")
        return item
    source = item.get("image", item.get("path"))
    if not isinstance(source, Image.Image | Path | str):
        keys = sorted(item)
        raise InputError(f"an image of the conversation has no file or image under 'image' (its keys: {keys})")
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        raise InputError(f"image {source[:80]} is not a file: images are read from files only, download it first")
    images.append(source)
    return {"type": "image"}


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file."""
    return read_object(path, CheckpointError) if path.is_file() else None


def _load(part: str, path: Path, loader: Callable[..., Any]) -> Any:
    """A part that transformers loads. Raises CheckpointError."""
    try:
        return loader(path)
    except Exception as error:  # all of it is transformers' own, and what it trips over is the files
        raise CheckpointError(f"the {part} in {path} cannot be loaded: {one_line(error)}") from error


def _require(path: Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Raises CheckpointError unless there is a file of each part, naming all that are missing."""
    missing = [
        f"{part} ({' or '.join(names)})"
        for part, names in parts.items()
        if not any((path / name).is_file() for name in names)
    ]
    if missing:
        raise CheckpointError(
            f"{path} has no {' and no '.join(missing)}: copy the files from the model's source, or save the model with "
            "surgeon.save, which does"
        )
