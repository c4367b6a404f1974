"""Mistakes in a checkpoint's config.json, drawn by a seed: for tests, and by hand over many
(`python tests/config_mutations.py 2000` counts what is not refused in one line)."""

import copy
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import passes
from checkpoints import tiny_model
from patching import apply
from surgeon import models
from surgeon.checkpoint import Checkpoint
from surgeon.errors import SurgeonError
from surgeon.inspect import inspect_checkpoint
from surgeon.patch import plan
from surgeon.recipe import Recipe

SECONDS = 20
"""What one checkpoint may take; more is counted as a hang."""
PVM, MIXIN = "pvm:layers=1,3,latent=32", "mixin:layers=0,2"
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "qwen3_vl": ("qwen3_vl", ()),
    "qwen2_5_vl": ("qwen2_5_vl", ()),
    "internvl": ("internvl", ()),
    "ovis2": ("ovis2", ()),
    "llava_onevision": ("llava_onevision", ()),
    "qwen3_vl patched": ("qwen3_vl", (PVM, MIXIN)),
    "qwen2_5_vl patched": ("qwen2_5_vl", (MIXIN,)),
    "internvl patched": ("internvl", (PVM, "mixin:layers=0,2,tiles=memory", "rope-dhr")),
    "ovis2 patched": ("ovis2", ("rope-dhr", "mixin:layers=3,tiles=context")),
    "llava_onevision patched": ("llava_onevision", (PVM,)),
}
"""By name: a family, and the passes that ran on it."""
# values of every type, and numbers at and beyond every edge
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 3, -1, 7, 10**9, 2**70, 0.5, -0.5, float("nan"), float("inf"),
    "", "x", "4", "layer_types", [], [1], ["x"], [None], [[1]], [0, 0], {}, {"a": 1}, {"kind": "pvm"},
)  # fmt: skip
# what models are made of; the rest of a config (ids, generation) is drawn too, but less often
_SIZES = (
    "num_hidden_layers", "layer_types", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rope_parameters", "rope_theta", "rope_type", "mrope_section",
    "depth", "num_heads", "patch_size", "image_size", "out_hidden_size", "deepstack_visual_indexes",
    "fullatt_block_indexes", "hidden_act", "text_config", "vision_config", "max_position_embeddings", "rms_norm_eps",
    "image_grid_pinpoints", "downsample_ratio", "model_type", "image_token_id", "dtype", "initializer_range",
)  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One mistake: `config` is what config.json holds, `what` says how it came about."""

    number: int
    source: str
    what: str
    config: dict[str, Any]


def make_sources(directory: Path) -> dict[str, Path]:
    """A tiny checkpoint for each of `SOURCES`, without preprocessing."""
    sources = {}
    for name, (family, arguments) in SOURCES.items():
        sources[name] = directory / name.replace(" ", "-")
        if not arguments:
            tiny_model(family).save_pretrained(sources[name])
            continue
        plain = sources[family]
        (plain / "preprocessor_config.json").write_text('{"min_patches": 1, "max_patches": 6}')
        apply(plain, sources[name], *arguments)
    return sources


def mutations(sources: dict[str, Path], count: int, seed: int) -> Iterator[Mutation]:
    """`count` of them, the sources in turn."""
    rng = random.Random(seed)
    configs = {name: json.loads((path / "config.json").read_text()) for name, path in sources.items()}
    names = list(sources)
    for number in range(count):
        name = names[number % len(names)]
        config = copy.deepcopy(configs[name])
        what = [mutate(config, rng) for _ in range(rng.choice((1, 1, 1, 2)))]
        yield Mutation(number, name, "; ".join(what), config)


def mutate(config: dict[str, Any], rng: random.Random) -> str:
    """Make one mistake in `config`, in place."""
    places = list(_places(config))
    ofrecord = [p for p in places if p[0] == "surgeon" and "passes" not in p and "source" not in p]
    sizes = [p for p in places if any(part in _SIZES for part in p) and p[0] != "surgeon"]
    chosen = rng.choices((ofrecord or sizes or places, sizes or places, places), (3, 5, 2))[0]
    path = rng.choice(chosen)
    parent = config
    for part in path[:-1]:
        parent = parent[part]
    key, where = path[-1], ".".join(map(str, path))
    value = parent[key]
    if rng.random() < 0.12:
        del parent[key]
        return f"without {where}"
    parent[key] = _another(value, rng)
    return f"{where} = {json.dumps(parent[key])[:80]}"


def _another(value: Any, rng: random.Random) -> Any:
    near: list[Any] = []
    if isinstance(value, bool):
        near = [not value]
    elif isinstance(value, int):
        near = [value + 1, value - 1, -value, value * 2, value / 2, str(value), [value], value * 10**7]
    elif isinstance(value, float):
        near = [-value, str(value), value * 1e300]
    elif isinstance(value, str):
        near = [value + "x", [value], value.upper(), {"type": value}]
    elif isinstance(value, list):
        near = [value[:-1], value + value, [str(v) for v in value], dict(enumerate(map(str, value))), [value]]
    elif isinstance(value, dict):
        near = [list(value), [value], {**value, "unknown": 1}, {}, dict.fromkeys(value)]
    return rng.choice((rng.choice(near or [0]), rng.choice(_VALUES)))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def commands(directory: Path, alone: bool = False) -> None:
    """What `inspect`, `patch --dry-run` and whoever loads a checkpoint do. Raises whatever comes of it.
    `alone`: it has no weights."""
    inspect_checkpoint(directory).model_dump_json()
    recipe_passes = Recipe.from_arguments([PVM.replace("1,3", "2"), MIXIN, "rope-dhr"]).make_passes(passes.registry())
    for each in recipe_passes:
        try:
            with Checkpoint.open(directory, weights="optional") as checkpoint:
                plan(checkpoint, [each])
        except SurgeonError as error:
            if error.exit_code != 2:
                raise
    if not alone:
        models.load(directory)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError; in the main thread alone."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(mutation: Mutation, sources: dict[str, Path], directory: Path) -> Exception | None:
    """Run the commands on a checkpoint with this config.json, its weights beside it or, for every other one, alone:
    what they raise, None where the config is sound after all."""
    alone = mutation.number % 2 == 1
    for file in directory.iterdir():
        file.unlink()
    if not alone:
        for file in sources[mutation.source].glob("*.safetensors*"):
            (directory / file.name).symlink_to(file)
    (directory / "config.json").write_text(json.dumps(mutation.config))
    try:
        with time_limit(SECONDS):
            commands(directory, alone)
    except Exception as error:
        return error
    return None


def is_internal(error: Exception | None) -> bool:
    """Whether the command line would call it a fault of the tool (exit code 3)."""
    return error is not None and not (isinstance(error, SurgeonError) and error.exit_code == 2)


def main(count: int, seed: int = 0, verbose: bool = False) -> None:
    kinds: Counter[str] = Counter()
    refused = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(Path(folder))
        place = Path(folder) / "mutated"
        place.mkdir()
        for number, mutation in enumerate(mutations(sources, count, seed)):
            error = outcome(mutation, sources, place)
            if verbose and not is_internal(error):
                print(f"{number} {mutation.source}: {mutation.what}: {error}")
            if error is not None and is_internal(error):
                frames = traceback.extract_tb(error.__traceback__)
                own = [f for f in frames if f"{os.sep}surgeon{os.sep}" in f.filename and ".venv" not in f.filename]
                at = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own else "?"
                kinds[f"{type(error).__name__} at {at}"] += 1
                if verbose:
                    reason = (str(error).splitlines() or [""])[0][:140]
                    print(f"{number} {mutation.source}: {mutation.what}: {type(error).__name__}: {reason} [{at}]")
            refused += error is not None and not is_internal(error)
    for kind, times in kinds.most_common():
        print(f"{times:5d} {kind}")
    seconds = time.monotonic() - start
    print(f"{sum(kinds.values())} internal errors in {count} mutations, {refused} refused, {seconds:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, "-v" in sys.argv)
