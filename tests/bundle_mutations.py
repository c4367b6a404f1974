"""Mistakes in a bundle's files, drawn by a seed (`python tests/bundle_mutations.py 300` counts what is not refused in
one line)."""

import hashlib
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
import torch
from PIL import Image

from checkpoints import tiny_checkpoint
from config_mutations import is_internal, mutate, time_limit
from exporters.export import export_bundle
from exporters.onnxruntime import BundleRuntime
from exporters.tensorrt.build import Options, plan_engines
from exporters.tensorrt.profiles import Limits
from patching import apply
from processor_mutations import damage
from surgeon.errors import SurgeonError
from surgeon.inputs import Prompt

SECONDS = 120
RECIPES = {
    "qwen3_vl": ("pvm:layers=1,3,latent=32",),
    "internvl": ("mixin:layers=0,2,tiles=memory", "rope-dhr"),
}
MANIFEST = "bundle.json"
FILES = (MANIFEST, MANIFEST, MANIFEST, "processor/config.json", "processor/config.json", "graph", "graph", "weights")


def make_sources(directory: Path) -> dict[str, Path]:
    bundles = {}
    for family, passes in RECIPES.items():
        plain, patched, bundle = (directory / f"{family}-{part}" for part in ("plain", "patched", "bundle"))
        apply(tiny_checkpoint(plain, family), patched, *passes)
        export_bundle(patched, bundle, dtype=torch.bfloat16, max_length=256)
        bundles[family] = bundle
    return bundles


def broken(sources: dict[str, Path], directory: Path, count: int, seed: int) -> Iterator[tuple[int, str]]:
    """Make `directory` one broken bundle after the other; -> its number, and what is wrong."""
    rng = random.Random(seed)
    for number in range(count):
        family = list(sources)[number % len(sources)]
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(sources[family], directory)
        name = rng.choice(FILES)
        if name == "graph":
            what = damage_graph(directory, rng)
        elif name == "weights":
            what = damage_weights(directory, rng)
        elif name == MANIFEST:
            content = json.loads((directory / name).read_text())
            what = mutate(content, rng)
            (directory / name).write_text(json.dumps(content))
        else:
            what = damage(directory / name, rng)
        yield number, f"{family} {name}: {what}"


def damage_graph(directory: Path, rng: random.Random) -> str:
    """In a graph's file, which bundle.json then describes as it is."""
    path = rng.choice(sorted(directory.glob("*.onnx")))
    content = bytearray(path.read_bytes())
    kind = rng.choice(("cut", "garbage", "empty", "bytes", "bytes"))
    if kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "garbage":
        content = bytearray(rng.randbytes(200))
    elif kind == "empty":
        content = bytearray()
    else:
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["graphs"][path.stem]["sha256"] = hashlib.sha256(content).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(manifest))
    return f"{kind} in {path.name}"


def damage_weights(directory: Path, rng: random.Random) -> str:
    path = rng.choice(sorted((directory / "weights").iterdir()))
    kind = rng.choice(("missing", "short", "long", "header"))
    content = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes({"short": content[:-7], "long": content + b"x", "header": b"\0" * 8 + content[8:]}[kind])
    return f"{path.name} {kind}"


def use(directory: Path) -> None:
    try:
        limits = Limits.parse(None, "1..2", None, None)
        plan_engines(directory, Options("tensorrt-rtx", "sm89", None, limits, None, None, False, (), "standard", None))
    except SurgeonError as error:
        if error.exit_code != 2:
            raise
    runtime = BundleRuntime(directory, provider="cpu", threads=1)
    image = Image.fromarray(np.arange(90 * 70 * 3, dtype=np.uint8).reshape(90, 70, 3))
    state, logits = runtime.start(runtime.prepare([Prompt("What is it?", (image,))]))
    runtime.step(state, logits.argmax(-1))


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
        for number, what in broken(sources, Path(folder) / "broken", count, seed):
            error = outcome(Path(folder) / "broken")
            if error is not None and is_internal(error):
                frames = traceback.extract_tb(error.__traceback__)
                own = [f for f in frames if ".venv" not in f.filename and f"{os.sep}tests{os.sep}" not in f.filename]
                kinds[f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"] += 1
            refused += error is not None and not is_internal(error)
            if verbose:
                print(number, what, "->", type(error).__name__, " ".join(str(error).split())[:250], flush=True)
    for kind, times in kinds.most_common():
        print(f"{times:5d} {kind}")
    print(f"{sum(kinds.values())} internal errors in {count} mutations, {refused} refused")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, "-v" in sys.argv)
