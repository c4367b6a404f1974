"""Mistakes in a checkpoint's tokenizer, chat template and image processor, drawn by a seed
(`python tests/processor_mutations.py 1000` counts what is not refused in one line)."""

import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoints import FAMILIES, tiny_checkpoint
from config_mutations import is_internal, mutate, time_limit
from surgeon.inputs import Inputs, Prompt

FILES = (
    "tokenizer.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "preprocessor_config.json",
    "generation_config.json", "chat_template.jinja", "chat_template.jinja",
)  # fmt: skip
SECONDS = 60


def make_sources(directory: Path) -> dict[str, Path]:
    return {family: tiny_checkpoint(directory / family, family) for family in FAMILIES}


def broken(sources: dict[str, Path], directory: Path, count: int, seed: int) -> Iterator[tuple[int, str]]:
    """Fill `directory` with one checkpoint after the other that has a mistake; -> its number, and what it is."""
    rng = random.Random(seed)
    for number in range(count):
        family = FAMILIES[number % len(FAMILIES)]
        for file in directory.iterdir():
            file.unlink()
        for file in sources[family].iterdir():
            if file.suffix != ".safetensors":
                shutil.copyfile(file, directory / file.name)
        name = rng.choice([name for name in FILES if (directory / name).is_file()])
        yield number, f"{family} {name}: {damage(directory / name, rng)}"


def damage(path: Path, rng: random.Random) -> str:
    text = path.read_text()
    if path.suffix == ".json" and rng.random() < 0.8:
        content = json.loads(text)
        what = mutate(content, rng)
        path.write_text(json.dumps(content))
        return what
    at, length = rng.randrange(len(text)), rng.choice((1, 2, 5, 20))
    new = rng.choice(("", "{{", "%}", "messages", "x", "1", "'", "for", "|", "loop", " + 1", "]"))
    if rng.random() < 0.1:
        path.write_text(text[:at])
        return f"cut at {at}"
    path.write_text(text[:at] + new + text[at + length :])
    return f"{text[at : at + length]!r} -> {new!r} at {at}"


def use(directory: Path) -> None:
    inputs = Inputs.from_directory(directory)
    image = Image.fromarray(np.arange(90 * 70 * 3, dtype=np.uint8).reshape(90, 70, 3))
    batch = inputs.prepare([Prompt("What is it?", (image,), system="Be brief."), Prompt("Hello")])
    inputs.decode(batch.input_ids[0])
    assert isinstance(inputs.eos_token_ids, tuple)


def outcome(directory: Path) -> Exception | None:
    try:
        with time_limit(SECONDS):
            use(directory)
    except Exception as error:
        return error
    return None


def main(count: int, seed: int, verbose: bool) -> None:
    kinds: Counter[str] = Counter()
    refused = 0
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(Path(folder))
        place = Path(folder) / "broken"
        place.mkdir()
        for number, what in broken(sources, place, count, seed):
            error = outcome(place)
            if error is not None and is_internal(error):
                frames = traceback.extract_tb(error.__traceback__)
                own = [f for f in frames if f"{os.sep}surgeon{os.sep}" in f.filename and ".venv" not in f.filename]
                kinds[f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"] += 1
            refused += error is not None and not is_internal(error)
            if verbose:
                print(number, what, "->", type(error).__name__, " ".join(str(error).split())[:250])
    for kind, times in kinds.most_common():
        print(f"{times:5d} {kind}")
    print(f"{sum(kinds.values())} internal errors in {count} mutations, {refused} refused")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, "-v" in sys.argv)
