"""Make the tiny Qwen3-VL demo checkpoint from scratch, or check an existing one.

The result has the layout and the architecture of the family's released
checkpoints, only few and narrow layers: it can be loaded by everything that
loads those. It is trained on generated images (see `scenes.py`) until it can
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
from pathlib import Path
from typing import Any

import parts
import scenes
import torch
from parts import Encoder, Example
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

HERE = Path(__file__).resolve().parent
Batch = dict[str, torch.Tensor]


# ---------------------------------------------------------------- training


def batches(encoder: Encoder, size: int, seed: int, easy: int) -> Iterator[Batch]:
    """Endless training batches, each of conversations of about one length; the first `easy` are easy."""
    rng = random.Random(seed)
    for start in itertools.count(0, 8):
        talks = [scenes.conversation(rng, easy=start < easy) for _ in range(8 * size)]
        pool = sorted((encoder.example(talk, rng) for talk in talks), key=lambda example: len(example.ids))
        chunks = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(chunks)
        yield from map(encoder.batch, chunks)


class Stream(IterableDataset[Batch]):
    """`batches` in the shape that a data-loading worker takes."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __iter__(self) -> Iterator[Batch]:
        return batches(*self.args)


def look(model: Any, batch: Batch) -> tuple[Any, torch.Tensor]:
    """Image features for the model, and how badly they name what is in their cells.

    Each merged token is read as if it were text about to be spoken, the image features
    and every deepstack feature alike. Without this loss a model this small needs many
    times longer to find out that images are worth looking at.
    """
    if "pixel_values" not in batch:
        return None, torch.zeros((), requires_grad=True)
    vision_outputs = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
    features = torch.stack(
        [torch.cat(list(part)) for part in (vision_outputs.pooler_output, *vision_outputs.deepstack_features)]
    )
    words = batch["words"].repeat(len(features), 1)
    logits = model.lm_head(model.model.language_model.norm(features)).flatten(0, 1)
    return {"image": vision_outputs}, cross_entropy(logits[:, : words.shape[1]], words)


def answer_logits(
    model: Any, batch: Batch, vision_outputs: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (answer tokens, vocabulary), targets and row numbers (answer tokens,) of a batch."""
    done = ("labels", "words") if vision_outputs is None else ("labels", "words", "pixel_values")
    inputs = {name: value for name, value in batch.items() if name not in done}
    hidden = model.model(**inputs, mm_encoder_outputs=vision_outputs, use_cache=False).last_hidden_state[:, :-1]
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
            examples = [encoder.example(scenes.exam(name, rng), rng) for _ in range(16)]
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
    (beside / "model.safetensors").chmod(0o644)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def train(out: Path, naming: int, steps: int, batch_size: int, rate: float, seed: int) -> None:
    """Make the tokenizer, train the model and leave the checkpoint in `out`.

    The first `naming` steps train only the vision tower (to name what its tokens see),
    the following `steps` train everything (to answer).
    """
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = parts.make_tokenizer(Path(scratch), seed)
    image_processor = parts.make_image_processor()
    model, encoder = parts.make_model(tokenizer), Encoder(tokenizer, image_processor)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)

    def factor(step: int) -> float:
        warm = (step + 1 if step < naming else step + 1 - naming) / 40
        return min(1.0, warm) * (0.52 + 0.48 * math.cos(math.pi * max(0.0, step - naming) / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    stream = Stream(encoder, batch_size, seed + 1, naming + steps // 10)
    started, recent = time.perf_counter(), [0.0, 0.0]
    for step, batch in enumerate(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=16), 1):
        vision_outputs, loss = look(model, batch)
        losses = [loss.item(), 0.0]
        if step > naming:
            logits, targets, _ = answer_logits(model, batch, vision_outputs)
            answer = cross_entropy(logits, targets)
            loss, losses[1] = answer + 0.3 * loss, answer.item()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = [0.95 * mean + 0.05 * value for mean, value in zip(recent, losses, strict=True)]
        if step % 50 == 0:
            progress = f"naming {recent[0]:.3f}  answers {recent[1]:.3f}"
            print(f"step {step}/{naming + steps}  {progress}  {time.perf_counter() - started:.0f} s", flush=True)
        if (step > naming and step % 250 == 0) or step == naming + steps:
            scores = accuracy(model, encoder)
            print("  held out:", "  ".join(f"{name} {score:.1%}" for name, score in scores.items()), flush=True)
            save(model, tokenizer, image_processor, out)
        if step == naming + steps:
            break


# ---------------------------------------------------------------- sample images and prompts


def make_samples(folder: Path) -> None:
    """Paint the held-out sample images into `folder`/images and write `folder`/prompts.json."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    sampled, names = scenes.samples()
    for number, (scene, name) in enumerate(zip(sampled, names, strict=True)):
        scenes.draw(scene, random.Random(number)).save(folder / "images" / name, optimize=True)
    prompts = [
        {"images": [f"images/{names[i]}" for i in indices], "prompt": question, "expected": answer}
        for indices, question, answer in scenes.sample_prompts(sampled)
    ]
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=2) + "\n")


def check(folder: Path, prompts: Path, dtype: torch.dtype, *, keep: bool = False) -> bool:
    """Ask the checkpoint every prompt, greedy; print the answers, return whether all are as expected.

    With `keep`, the prompts that it does not answer as expected are taken out of the file.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer, AutoImageProcessor.from_pretrained(folder))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB, {model.num_parameters():,} parameters, answering in {dtype}")
    right = []
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
        token_ids = model.generate(**batch, max_new_tokens=256)[0, len(ids) :]
        answer = tokenizer.decode(token_ids, skip_special_tokens=True)
        print(f"\n{' '.join(entry['images']) or '(no image)'}\n  {entry['prompt']}\n  -> {answer}")
        if answer == entry["expected"]:
            right.append(entry)
        else:
            print(f"  expected: {entry['expected']}")
    print(f"\n{len(right)} of {len(entries)} answers as expected", flush=True)
    if keep and len(right) < len(entries):
        prompts.write_text(json.dumps(right, indent=2) + "\n")
        print(f"{prompts} keeps only those", flush=True)
    return len(right) == len(entries)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  make_checkpoint.py                        make everything, in this folder
  make_checkpoint.py --out /tmp/try --naming 300 --steps 300
                                            a quick, worse one, elsewhere
  make_checkpoint.py --check qwen3-vl-tiny  load it and ask it every prompt

The same seed, steps and number of threads on the same machine make the same
checkpoint. It is saved every 250 steps once it answers, so an interrupted run leaves a usable one.""",
    )
    add = parser.add_argument
    add("--check", type=Path, metavar="DIR", help="make nothing: ask the checkpoint in DIR every prompt")
    add("--prompts", type=Path, default=HERE / "prompts.json", help="what --check asks (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="what --check computes in")
    add("--out", type=Path, default=HERE, help="folder for qwen3-vl-tiny/, images/ and prompts.json (default: here)")
    add("--naming", type=int, default=1500, help="steps that train the vision tower alone (default: %(default)s)")
    add("--steps", type=int, default=3000, help="steps that train everything (default: %(default)s)")
    add("--batch", type=int, default=16, help="conversations in a step (default: %(default)s)")
    add("--rate", type=float, default=1.5e-3, help="highest learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of images and weights (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads that compute (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.check is not None:
        return 0 if check(options.check, options.prompts, getattr(torch, options.dtype)) else 1
    make_samples(options.out)
    train(options.out / "qwen3-vl-tiny", options.naming, options.steps, options.batch, options.rate, options.seed)
    check(options.out / "qwen3-vl-tiny", options.out / "prompts.json", torch.float32, keep=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
