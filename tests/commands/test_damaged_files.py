"""Files that are not what they should be: each command says so in one line, with exit code 2, and in little time."""

import hashlib
import json
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageFile
from transformers.utils import logging

from checkpoints import has_tokenizer
from command import assert_refused, process, run
from exporters.export import export_bundle
from patching import apply
from surgeon import rendering

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
PVM = "pvm:layers=1,3,latent=32"


@pytest.fixture(autouse=True, scope="module")
def no_progress() -> Iterator[None]:
    """As in a process of its own, which says so before transformers is imported."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def large_png(path: Path, side: int) -> Path:
    """A black image of side x side pixels, of one bit each, in a few KB."""
    row = zlib.compress(b"\0" * ((1 + -(-side // 8)) * side), 9)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b""))
    return path


# -- a checkpoint's config ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["text_config"].update(num_hidden_layers=3), "layer_types"),
        (lambda c: c["text_config"].update(num_hidden_layers=10**9, layer_types=None), "num_hidden_layers"),
        (lambda c: c["text_config"].update(num_attention_heads="4"), "num_attention_heads"),
        (lambda c: c.update(vision_config=[]), "vision_config"),
        (lambda c: c["surgeon"].update(grafts="pvm"), "surgeon.grafts"),
        (lambda c: c["surgeon"]["grafts"][0].update(layers=["1"]), "surgeon.grafts.0.layers"),
        (lambda c: c["surgeon"]["grafts"][0].update(latent=None), "surgeon.grafts.0.latent"),
        (lambda c: c["surgeon"]["grafts"].append(5), "surgeon.grafts.1"),
    ],
)
def test_a_config_with_a_mistake(
    patched: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    config = Path(shutil.copytree(patched, tmp_path / "ckpt")) / "config.json"
    # transformers writes the types of layers for some text models only; they are checked where they are
    edit(config, lambda c: c["text_config"].update(layer_types=["full_attention"] * 4))
    edit(config, change)
    begin = time.monotonic()
    for arguments in (
        ("inspect", config.parent),
        ("patch", config.parent, "--dry-run", "--pass", "mixin:layers=2"),
        ("generate", config.parent, "--prompt", "x"),
        ("export", config.parent, tmp_path / "bundle", "--dtype", "fp32"),
    ):
        assert_refused(run(*arguments), expected)
    assert time.monotonic() - begin < 60


@pytest.fixture(scope="module")
def patched(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("patched") / "patched"
    apply(source, target, PVM)
    return target


# -- tokenizer, template, image processor ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tokenizer.json", '{"model": {}}', "the tokenizer in"),
        ("tokenizer.json", "[1, 2]", "the tokenizer in"),
        ("tokenizer_config.json", '{"model_max_length": "4"}', "the tokenizer"),
        (
            "preprocessor_config.json",
            '{"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 0}',
            "patch_size",
        ),
        ("preprocessor_config.json", '{"image_processor_type": 5}', "the image processor in"),
        ("generation_config.json", '{"eos_token_id": ["a"]}', "generation_config.json: eos_token_id"),
        ("chat_template.jinja", "{% for %}", "the chat template does not take this conversation"),
        ("chat_template.jinja", "{{ 1 / 0 }}", "ZeroDivisionError"),
        ("chat_template.jinja", "{{ raise_exception('images first') }}", "images first"),
        ("chat_template.jinja", "{{ messages.x.y }}", "has no attribute"),
        ("chat_template.json", '{"chat_template": 7}', "TypeError"),
    ],
)
def test_what_prompts_are_made_with(copy: Path, tmp_path: Path, name: str, text: str, expected: str) -> None:
    (copy / name).write_text(text)
    image = large_png(tmp_path / "small.png", 64)
    assert_refused(run("generate", copy, "--image", image, "--prompt", "x", "--max-new-tokens", 1), expected)


def test_a_template_that_never_ends(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering.render, "__defaults__", (0.5, rendering.MEMORY))
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (copy / "chat_template.jinja").write_text(loop)
    assert_refused(run("generate", copy, "--prompt", "x"), "the chat template does not end within 0.5 s")


# -- images ----------------------------------------------------------------------------------------------------
def test_an_image_too_large_to_decode(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = large_png(tmp_path / "large.png", 13000)
    assert image.stat().st_size < 30_000

    def decoded(self: ImageFile.ImageFile) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    result = run("generate", source, "--image", image, "--prompt", "x")
    assert_refused(result, "large.png is too large: 13000 x 13000 pixels, and 89 million are read; scale it down first")


# -- bundles -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def exported_bundle(patched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundle") / "bundle"
    export_bundle(patched, target, dtype=torch.bfloat16, max_length=256)
    return target


@pytest.fixture
def bundle(exported_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_bundle, tmp_path / "bundle"))


def replace_graph(bundle: Path, name: str, content: bytes) -> None:
    """A graph's file, which bundle.json then describes as it is."""
    (bundle / f"{name}.onnx").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit(bundle / "bundle.json", lambda m: m["graphs"][name].update(sha256=digest))


def damage_config_json(bundle: Path) -> None:
    (bundle / "processor" / "config.json").write_text("[]")


def damage_config_layers(bundle: Path) -> None:
    edit(bundle / "processor" / "config.json", lambda c: c["text_config"].update(num_hidden_layers="4"))


def damage_config_record(bundle: Path) -> None:
    edit(bundle / "processor" / "config.json", lambda c: c["surgeon"]["grafts"][0].update(layers=[1]))


def damage_manifest_sizes(bundle: Path) -> None:
    edit(bundle / "bundle.json", lambda m: m["sizes"].update(head_dim=32))


def damage_manifest_file(bundle: Path) -> None:
    edit(bundle / "bundle.json", lambda m: m["graphs"]["embed"].update(file="../embed.onnx"))


def damage_manifest_graph(bundle: Path) -> None:
    edit(bundle / "bundle.json", lambda m: m["graphs"].pop("embed"))


def damage_truncated(bundle: Path) -> None:
    replace_graph(bundle, "embed", (bundle / "embed.onnx").read_bytes()[:-9])


def damage_garbage(bundle: Path) -> None:
    replace_graph(bundle, "decoder", b"no graph at all")


def damage_empty(bundle: Path) -> None:
    replace_graph(bundle, "vision", b"")


def damage_other_graph(bundle: Path) -> None:
    replace_graph(bundle, "memory", (bundle / "embed.onnx").read_bytes())


def damage_weights(bundle: Path) -> None:
    shutil.rmtree(bundle / "weights")


AT_ONCE = (damage_manifest_file, damage_weights)
"""Whatever reads bundle.json notices."""
OF_CONFIG = (damage_config_json, damage_config_layers, damage_config_record, damage_manifest_sizes)
"""Planning engines does not read the processor."""


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_config_json, "processor/config.json holds a JSON list where an object is expected"),
        (damage_config_layers, "num_hidden_layers"),
        (damage_config_record, "source.grafts"),
        (damage_manifest_sizes, "sizes.head_dim is 32"),
        (damage_manifest_file, "'../embed.onnx' is no path inside the bundle"),
        (damage_manifest_graph, "has no graph embed"),
        (damage_truncated, "embed.onnx is no ONNX graph"),
        (damage_garbage, "decoder.onnx is no ONNX graph"),
        (damage_empty, "vision.onnx has the inputs none"),
        (damage_other_graph, "memory.onnx has the inputs input_ids"),
        (damage_weights, "is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_bundle(
    bundle: Path, patched: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    damage(bundle)
    image = large_png(tmp_path / "small.png", 64)
    asked = ("--image", image, "--prompt", "x")
    assert_refused(run("generate", bundle, *asked, "--max-new-tokens", 2, "--backend", "ort-cpu"), expected)
    assert_refused(run("validate", patched, bundle, *asked, "--steps", 1, "--backend", "ort-cpu"), expected)
    if damage not in (*OF_CONFIG, damage_manifest_graph):
        assert_refused(run("engine", bundle, "--target", "sm89", "--dry-run"), expected)
    if damage in AT_ONCE:
        assert_refused(run("inspect", bundle), expected)


@pytest.mark.long  # that it is refused, and how, is above
def test_a_damaged_bundle_is_not_measured(bundle: Path) -> None:
    damage_garbage(bundle)
    done = process("bench", bundle, "--tokens", 2, "--rounds", 1, "--backend", "ort-cpu")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "decoder.onnx is no ONNX graph" in line
