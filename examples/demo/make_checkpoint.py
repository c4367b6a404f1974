"""Make the tiny Qwen3-VL demo checkpoint from nothing, or check one that is made.

The result has the layout and the architecture of the family's released
checkpoints, only few and narrow layers: it can be loaded by everything that
loads those. It is trained on generated pictures (see `pictures.py`) until it can
say what is in them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pictures
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

HERE = Path(__file__).resolve().parent
SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|>
<|video_pad|>""".split()
MARKERS = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
<|file_sep|> <tool_response> </tool_response> <think> </think>""".split()
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SAMPLE_SIZES = ((221, 147), (131, 203), (109, 97), (310, 173), (190, 205))

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


# ---------------------------------------------------------------- parts of the checkpoint


def make_tokenizer(folder: Path, seed: int) -> Any:
    """Train the byte-level BPE tokenizer on generated words; leave it in `folder`, return it."""
    rng = random.Random(seed)
    corpus = [text for _ in range(4000) for turn in pictures.conversation(rng).turns for text in turn]
    corpus += [text for turn in pictures.SMALL_TALK for text in turn for _ in range(40)]
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
    return AutoTokenizer.from_pretrained(folder)


def make_image_processor() -> Qwen2VLImageProcessorPil:
    """The family's image processor, for pictures of 4 to 16 merged tokens."""
    return Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128},
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
    """One conversation: `ids` and `supervised` are of the same length, `grids` is (images, 3)."""

    ids: list[int]
    supervised: list[bool]
    pixels: torch.Tensor | None
    grids: torch.Tensor | None


class Encoder:
    """Turns conversations into tensors the way the family's processor does."""

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def images(self, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches (patches, 1536) and grids (images, 3)."""
        seen = self.image_processor(images=images, return_tensors="pt")
        return seen["pixel_values"], seen["image_grid_thw"]

    def ids(self, text: str, grids: torch.Tensor | None) -> list[int]:
        """Token ids, each image token repeated to the merged tokens of its picture."""
        counts = [] if grids is None else (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        waiting = iter(counts)
        return [t for token in tokens for t in [token] * (next(waiting) if token == self.image_token else 1)]

    def example(self, talk: pictures.Conversation, rng: random.Random) -> Example:
        """A whole conversation, supervised on its answers and the end of each."""
        pixels, grids = self.images([pictures.draw(s, rng) for s in talk.scenes]) if talk.scenes else (None, None)
        out = Example([], [], pixels, grids)
        for number, (question, answer) in enumerate(talk.turns):
            seen = IMAGE * len(talk.scenes) if number == 0 else ""
            asked = f"<|im_start|>user\n{seen}{question}<|im_end|>\n<|im_start|>assistant\n"
            parts = (asked, False), (f"{answer}<|im_end|>", True), ("\n", False)
            for text, supervised in parts:
                ids = self.ids(text, grids)
                out.ids += ids
                out.supervised += [supervised] * len(ids)
        return out

    def batch(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Right-padded model inputs (batch, length) and `labels`, -100 where nothing is to be learned."""
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
        return inputs


# ---------------------------------------------------------------- training


def batches(encoder: Encoder, size: int, seed: int, easy: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless training batches, each of conversations of about one length; the first `easy` are easy."""
    rng = random.Random(seed)
    for start in itertools.count(0, 8):
        talks = [pictures.conversation(rng, easy=start < easy) for _ in range(8 * size)]
        pool = sorted((encoder.example(talk, rng) for talk in talks), key=lambda example: len(example.ids))
        chunks = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(chunks)
        yield from map(encoder.batch, chunks)


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """`batches` in the shape that a data-loading worker takes."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return batches(*self.args)


def answer_logits(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (answer tokens, vocabulary), targets and row numbers (answer tokens,) of a batch."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:]
    chosen = targets != -100
    return model.lm_head(hidden[chosen]), targets[chosen], chosen.nonzero()[:, 0]


@torch.no_grad()
def accuracy(model: Any, encoder: Encoder, count: int = 96) -> dict[str, float]:
    """Share of held-out answers that greedy decoding gives word for word, by the kind of request.

    An answer is right where the likeliest token is the wanted one at each of its
    places, which is the same as greedy decoding giving exactly that answer.
    """
    scores = {}
    for name in ("short", "question", "detail", "each"):
        rng, right = random.Random(f"held out {name}"), 0
        for _ in range(0, count, 16):
            examples = [encoder.example(pictures.exam(name, rng), rng) for _ in range(16)]
            logits, targets, rows = answer_logits(model, encoder.batch(examples))
            wrong = rows[logits.argmax(-1) != targets]
            right += 16 - len(wrong.unique())
        scores[name] = right / count
    return scores


def save(model: Any, tokenizer: Any, image_processor: Any, folder: Path) -> None:
    """Write the checkpoint in bfloat16 beside `folder`, then put it in its place."""
    beside, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (beside, old):
        shutil.rmtree(stale, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    image_processor.save_pretrained(beside)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def train(out: Path, steps: int, batch_size: int, rate: float, seed: int) -> None:
    """Make the tokenizer, train the model and leave the checkpoint in `out`."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = make_tokenizer(Path(scratch), seed)
    image_processor = make_image_processor()
    model, encoder = make_model(tokenizer), Encoder(tokenizer, image_processor)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    warmup = min(60, steps)

    def factor(step: int) -> float:
        turn = math.cos(math.pi * min(1.0, step / steps))
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (0.5 + 0.5 * turn))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    stream = Stream(encoder, batch_size, seed + 1, steps // 6)
    started, recent = time.perf_counter(), 0.0
    for step, batch in enumerate(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=16), 1):
        logits, targets, _ = answer_logits(model, batch)
        loss = cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()
        if step % 50 == 0:
            print(f"step {step}/{steps}  loss {recent:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
        if step % 250 == 0 or step == steps:
            scores = accuracy(model, encoder)
            print("  held out:", "  ".join(f"{name} {score:.1%}" for name, score in scores.items()), flush=True)
            save(model, tokenizer, image_processor, out)
        if step == steps:
            break


# ---------------------------------------------------------------- sample pictures and prompts


def make_samples(folder: Path) -> None:
    """Paint the held-out sample pictures into `folder`/images and write `folder`/prompts.json."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    scenes, names = pictures.samples()
    for number, (scene, name) in enumerate(zip(scenes, names, strict=True)):
        pictures.draw(scene, random.Random(number)).save(folder / "images" / name, optimize=True)
    prompts = [
        {"images": [f"images/{names[i]}" for i in shown], "prompt": question, "expected": answer}
        for shown, question, answer in pictures.sample_prompts(scenes)
    ]
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=2) + "\n")


def check(folder: Path, prompts: Path, dtype: torch.dtype) -> bool:
    """Ask the checkpoint every prompt, greedy; print the answers, return whether all are as expected."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer, AutoImageProcessor.from_pretrained(folder))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB, {model.num_parameters():,} parameters, answering in {dtype}")
    right = 0
    entries = json.loads(prompts.read_text())
    for entry in entries:
        images = [Image.open(prompts.parent / name).convert("RGB") for name in entry["images"]]
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": entry["prompt"]}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pixels, grids = encoder.images(images) if images else (None, None)
        ids = encoder.ids(text, grids)
        batch = encoder.batch([Example(ids, [False] * len(ids), pixels, grids)])
        del batch["labels"]
        told = model.generate(**batch, max_new_tokens=256)[0, len(ids) :]
        answer = tokenizer.decode(told, skip_special_tokens=True)
        right += answer == entry["expected"]
        print(f"\n{' '.join(entry['images']) or '(no picture)'}\n  {entry['prompt']}\n  -> {answer}")
        if answer != entry["expected"]:
            print(f"  expected: {entry['expected']}")
    print(f"\n{right} of {len(entries)} answers as expected", flush=True)
    return right == len(entries)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  make_checkpoint.py                        make everything, in this folder
  make_checkpoint.py --out /tmp/try --steps 300
                                            a quick, worse one, elsewhere
  make_checkpoint.py --check qwen3-vl-tiny  load it and ask it every prompt

The same seed, steps and number of threads on the same machine make the same
checkpoint. It is saved every 250 steps, so an interrupted run leaves a usable one.""",
    )
    parser.add_argument("--check", type=Path, metavar="DIR", help="make nothing: ask the checkpoint in DIR every prompt")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.json", help="what --check asks (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what --check computes in")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for qwen3-vl-tiny/, images/ and prompts.json")
    parser.add_argument("--steps", type=int, default=2400, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="conversations in a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures, words and weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads that compute (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.check is not None:
        return 0 if check(options.check, options.prompts, getattr(torch, options.dtype)) else 1
    make_samples(options.out)
    train(options.out / "qwen3-vl-tiny", options.steps, options.batch, options.rate, options.seed)
    return 0 if check(options.out / "qwen3-vl-tiny", options.out / "prompts.json", torch.float32) else 1


if __name__ == "__main__":
    raise SystemExit(main())
