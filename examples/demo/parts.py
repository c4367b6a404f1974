"""The parts of the demo checkpoint: tokenizer, chat template, image processor, model.

All follow the family's released checkpoints, only smaller; the special tokens and
the turns that the chat template writes are the family's own.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scenes
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
MARKERS = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

CHAT_TEMPLATE = r"""
{%- set images = namespace(count=0) %}
{%- set videos = namespace(count=0) %}
{%- macro text_of(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for item in content %}
            {%- if 'text' in item %}{{- item.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- macro all_of(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for item in content %}
            {%- if item.type == 'image' or 'image' in item or 'image_url' in item %}
                {%- set images.count = images.count + 1 %}
                {%- if add_vision_id %}{{- 'Picture ' ~ images.count ~ ': ' }}{%- endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif item.type == 'video' or 'video' in item %}
                {%- set videos.count = videos.count + 1 %}
                {%- if add_vision_id %}{{- 'Video ' ~ videos.count ~ ': ' }}{%- endif %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in item %}
                {{- item.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- text_of(messages[0].content) + '\n\n' }}{%- endif %}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + text_of(messages[0].content) + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + all_of(message.content) + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + text_of(message.content) }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{- '\n' }}{%- endif %}
            {%- set call = call.function or call %}
            {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson %}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' + arguments + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + all_of(message.content) + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""".lstrip()


def make_tokenizer(folder: Path, seed: int) -> Any:
    """Train the byte-level BPE tokenizer on generated words; leave it in `folder`, return it."""
    rng = random.Random(seed)
    corpus = [text for _ in range(4000) for turn in scenes.conversation(rng).turns for text in turn]
    corpus += [text for turn in scenes.SMALL_TALK for text in turn for _ in range(40)]
    corpus += ["system user assistant Picture Video seconds"] * 40
    raw = Tokenizer.from_str(Qwen2Tokenizer().backend_tokenizer.to_str())
    raw.model = models.BPE()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    raw.add_tokens([AddedToken(token, normalized=False) for token in MARKERS])
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 4096,
        "split_special_tokens": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for where in ("is_local", "local_files_only"):  # of this loading, not of the tokenizer
        tokenizer.init_kwargs.pop(where, None)
    return tokenizer


def make_image_processor() -> Qwen2VLImageProcessorPil:
    """The family's image processor, for images of 4 to 9 merged tokens."""
    return Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        size={"shortest_edge": 64 * 64, "longest_edge": 96 * 96},
    )


def make_model(tokenizer: Any) -> Qwen3VLForConditionalGeneration:
    """The untrained model, in float32. Its vocabulary is padded, as the family's are."""
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "eos_token_id": token_id("<|im_end|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
        },
    }
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 256,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1, 2],
        "initializer_range": 0.05,
        "out_hidden_size": text["hidden_size"],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[token_id("<|im_end|>"), token_id("<|endoftext|>")],
        pad_token_id=token_id("<|endoftext|>"),
    )
    return model


# ---------------------------------------------------------------- conversations as tensors


@dataclass
class Example:
    """One conversation.

    `ids` and `supervised` are of the same length; `pixels` is (patches, 1536) and `grids`
    (images, 3); `cells` has, for each merged token, the words for what is in its cell.
    """

    ids: list[int]
    supervised: list[bool]
    pixels: torch.Tensor | None = None
    grids: torch.Tensor | None = None
    cells: list[tuple[str, ...]] = field(default_factory=list)


class Encoder:
    """Turns conversations into tensors the way the family's processor does."""

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.word_ids: dict[str, int] = {}
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def word(self, word: str) -> int:
        """The (first) token of a word inside a sentence."""
        if word not in self.word_ids:
            self.word_ids[word] = self.tokenizer(f" {word}")["input_ids"][0]
        return self.word_ids[word]

    def images(self, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches (patches, 1536) and grids (images, 3)."""
        processed = self.image_processor(images=images, return_tensors="pt")
        return processed["pixel_values"], processed["image_grid_thw"]

    def ids(self, text: str, grids: torch.Tensor | None) -> list[int]:
        """Token ids, each image token repeated to the merged tokens of its image."""
        counts = [] if grids is None else (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        waiting = iter(counts)
        return [t for token in tokens for t in [token] * (next(waiting) if token == self.image_token else 1)]

    def example(self, talk: scenes.Conversation, rng: random.Random) -> Example:
        """A whole conversation, supervised on its answers and the end of each."""
        out = Example([], [])
        if talk.scenes:
            merge = self.image_processor.merge_size
            out.pixels, out.grids = self.images([scenes.draw(scene, rng) for scene in talk.scenes])
            for scene, (_, height, width) in zip(talk.scenes, out.grids.tolist(), strict=True):
                out.cells += scenes.cells(scene, height // merge, width // merge)
        for number, (question, answer) in enumerate(talk.turns):
            placeholders = IMAGE * len(talk.scenes) if number == 0 else ""
            user_turn = f"<|im_start|>user\n{placeholders}{question}<|im_end|>\n<|im_start|>assistant\n"
            parts = (user_turn, False), (f"{answer}<|im_end|>", True), ("\n", False)
            for text, supervised in parts:
                ids = self.ids(text, out.grids)
                out.ids += ids
                out.supervised += [supervised] * len(ids)
        return out

    def batch(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Right-padded model inputs (batch, length), and what is to be learned.

        `labels` (batch, length) is -100 where no answer is; each row of `words` (merged
        tokens, tokens of the tokenizer) is spread over the words for one cell.
        """
        length = max(len(example.ids) for example in examples)
        ids = torch.full((len(examples), length), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, example in enumerate(examples):
            size = len(example.ids)
            ids[row, :size] = torch.tensor(example.ids)
            labels[row, :size] = torch.where(torch.tensor(example.supervised), ids[row, :size], -100)
            mask[row, :size] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if grids := [e.grids for e in examples if e.grids is not None]:
            inputs["mm_token_type_ids"] = (ids == self.image_token).int()
            inputs["image_grid_thw"] = torch.cat(grids)
            inputs["pixel_values"] = torch.cat([e.pixels for e in examples if e.pixels is not None])
        if cells := [cell for example in examples for cell in example.cells]:
            words = inputs["words"] = torch.zeros(len(cells), len(self.tokenizer))
            for row, cell in enumerate(cells):
                words[row, [self.word(word) for word in cell]] = 1 / len(cell)
        return inputs
