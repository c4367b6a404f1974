"""Real engines of TensorRT for RTX, for three generations of GPUs, of every family and pass; nothing here needs one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import CASES, Case
from exporters.onnx.manifest import Manifest
from exporters.tensorrt.build import Options, build_engines
from exporters.tensorrt.errors import EngineError, LayerError
from exporters.tensorrt.layers import Operator
from exporters.tensorrt.manifest import EngineManifest
from exporters.tensorrt.profiles import Limits, Range
from surgeon.checkpoint import read_header
from surgeon.errors import BundleError, CheckpointError, SurgeonError, TargetError

Engines = Callable[..., Any]


BUILT = [*CASES[:2], *(pytest.param(case, marks=pytest.mark.long) for case in CASES[2:])]


@pytest.mark.parametrize("case", BUILT, ids=str)
def test_every_family_and_pass_builds_with_all_attention_fused(engines: Engines, case: Case) -> None:
    bundle, directory, built = engines(case)
    manifest = Manifest.load(bundle)
    assert list(built.manifest.engines) == list(manifest.graphs)
    # the query builder's attention, of eight heads whatever its width, runs once an invocation
    assert [text for text in built.report.warnings() if not text.startswith("query_builder:")] == []
    decoder = built.report.graphs["decoder"]
    layers = manifest.sizes.num_hidden_layers
    attentions = layers + len(manifest.memory)
    assert decoder.count("Attention") == (attentions, attentions)
    assert decoder.count("TensorScatter") == (2 * layers, 2 * layers)
    assert decoder.count("RotaryEmbedding")[0] >= 2 * layers
    fused, total = built.report.graphs["vision"].count("Attention")
    assert fused == total > 0
    # one kernel for each profile: that of decoding reads one query
    own = next(each for each in decoder.operators if each.node == "node_attention.0")
    assert {"_gemv_mha_v1", "_gemm_mha_v2"} <= set(own.kernels)
    for name, engine in built.manifest.engines.items():
        assert (directory / engine.file).stat().st_size == engine.bytes > 10_000
        assert built.peak_memory[name] > 50 << 20


def test_the_same_again_gives_the_same_layer_report(engines: Engines, tmp_path: Path) -> None:
    bundle, directory, built = engines()
    options = Options(target="sm80,sm89,sm120", limits=Limits(batch=Range.of(1, 4)), graphs=("decoder",))
    again = build_engines(bundle, tmp_path / "again", options)
    assert again.report.graphs["decoder"] == built.report.graphs["decoder"]
    assert list(again.manifest.engines) == ["decoder"]
    layer_report = json.loads((directory / "layers.json").read_text())["graphs"]["decoder"]
    assert layer_report == json.loads((tmp_path / "again" / "layers.json").read_text())["graphs"]["decoder"]


def test_nothing_of_the_bundle_is_needed_or_changed(engines: Engines) -> None:
    bundle, directory, built = engines()
    Manifest.load(bundle)  # its digests still hold
    written = {path.name for path in directory.iterdir()}
    assert written == {f"{name}.engine" for name in built.manifest.engines} | {
        "engine.json",
        "layers.json",
        "processor",
    }
    assert {p.name for p in (directory / "processor").iterdir()} == {p.name for p in (bundle / "processor").iterdir()}
    manifest = EngineManifest.load(directory)
    assert manifest == built.manifest
    assert manifest.bundle == Manifest.load(bundle)
    manifest.check_bundle(bundle)


def test_progress_is_the_librarys_own(engines: Engines, tmp_path: Path) -> None:
    bundle, _, _ = engines()
    seen: list[tuple[str, int, int]] = []
    options = Options(target="sm89", graphs=("embed",))
    build_engines(bundle, tmp_path / "out", options, progress=lambda *step: seen.append(step))
    assert {stage for stage, _, _ in seen} == {"embed: building engine"}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2]


def test_the_cache_gives_back_what_was_built(engines: Engines, tmp_path: Path) -> None:
    bundle, _, _ = engines()
    options = Options(target="sm89", graphs=("embed", "memory"), cache=tmp_path / "cache")
    first = build_engines(bundle, tmp_path / "a", options)
    second = build_engines(bundle, tmp_path / "b", options)
    assert all(first.peak_memory.values()) and not any(second.peak_memory.values())
    assert second.manifest.engines == first.manifest.engines
    assert second.report == first.report
    # other targets and other limits are other engines
    other = Options(target="sm80", graphs=("embed",), cache=tmp_path / "cache")
    assert build_engines(bundle, tmp_path / "c", other).peak_memory["embed"]
    # and so are those of a fine-tune, of which not even the bundle's manifest knows
    shutil.copytree(bundle, tmp_path / "tuned")
    (weights,) = (tmp_path / "tuned" / "weights").iterdir()
    infos = read_header(weights)
    table = next(info for name, info in infos.items() if name.endswith("embed_tokens.weight"))
    data = bytearray(weights.read_bytes())
    data[table.offset + table.nbytes // 2] ^= 1
    weights.write_bytes(data)
    just_embed = Options(target="sm89", graphs=("embed",), cache=tmp_path / "cache")
    assert build_engines(tmp_path / "tuned", tmp_path / "e", just_embed).peak_memory["embed"]
    assert not build_engines(bundle, tmp_path / "f", just_embed).peak_memory["embed"]
    wider = Options(target="sm89", graphs=("embed",), cache=tmp_path / "cache", limits=Limits(batch=Range.of(1, 2)))
    assert build_engines(bundle, tmp_path / "d", wider).peak_memory["embed"]


def test_strict_refuses_attention_that_fell_apart(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _, _ = engines()
    from exporters.tensorrt import layers

    def apart(*arguments: Any) -> Any:
        graph_layers = real(*arguments)
        broken = Operator(node="node_x", operator="Attention", fused=False, kernels=[], reason="no kernel")
        return graph_layers.model_copy(update={"operators": [broken]})

    real = layers.report
    monkeypatch.setattr(layers, "report", apart)
    options = Options(target="sm89", graphs=("embed",))
    built = build_engines(bundle, tmp_path / "a", options)
    (warning,) = built.report.warnings()
    assert "node_x" in warning and "no kernel" in warning
    with pytest.raises(LayerError, match="node_x"):
        build_engines(bundle, tmp_path / "b", Options(target="sm89", graphs=("embed",), strict=True))
    assert not list(tmp_path.glob("*b*"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(target="sm99"), "unknown target 'sm99'.*sm89"),
        (Options(target=""), "--target needs one of"),
        (Options(target="sm89,native"), "native stands alone"),
        (Options(target="sm89", dtype="bf16"), "the bundle is of float16"),
        (Options(target="sm89", graphs=("audio",)), "no graph 'audio'; it has embed, vision, memory, decoder"),
        (Options(target="sm89", timing_cache=Path("x")), "--timing-cache: tensorrt-rtx times nothing"),
        (Options(target="sm89", limits=Limits(prefill=Range.of(1, 512))), "--prefill 1..512: .* hold 256 tokens"),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_built_is_refused_at_once(
    engines: Engines, tmp_path: Path, options: Options, expected: str
) -> None:
    bundle, _, _ = engines()
    with pytest.raises(EngineError, match=expected) as raised:
        build_engines(bundle, tmp_path / "out", options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_fp32_is_refused_and_so_is_what_is_no_bundle(engines: Engines, tmp_path: Path) -> None:
    shutil.copytree(engines()[0], tmp_path / "bundle")
    described = tmp_path / "bundle" / "bundle.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"dtype": "float32"}))
    with pytest.raises(EngineError, match="float32, for which tensorrt-rtx has no attention kernels; export it again"):
        build_engines(tmp_path / "bundle", tmp_path / "out", Options(target="sm89"))
    with pytest.raises(BundleError, match="no bundle"):
        build_engines(tmp_path, tmp_path / "out", Options(target="sm89"))


def test_a_bundle_of_a_newer_version_and_a_target_that_exists(engines: Engines, tmp_path: Path) -> None:
    bundle, directory, _ = engines()
    with pytest.raises(TargetError, match="exists"):
        build_engines(bundle, directory, Options(target="sm89"))
    content = json.loads((bundle / "bundle.json").read_text()) | {"format": 99}
    (tmp_path / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match="format 99"):
        build_engines(tmp_path, tmp_path / "out", Options(target="sm89"))


@pytest.mark.parametrize("file", ["weights/*", "processor/tokenizer.json", "vision.onnx"])
def test_a_bundle_that_changes_while_it_is_read_leaves_nothing(engines: Engines, tmp_path: Path, file: str) -> None:
    bundle = Path(shutil.copytree(engines()[0], tmp_path / "bundle"))
    path = next(bundle.glob(file))

    def write(stage: str, done: int, total: int) -> None:
        """Cut short for a moment, which may or may not be when the library reads it."""
        path.write_bytes(path.read_bytes())

    options = Options(target="sm89", graphs=("embed",))
    with pytest.raises(SurgeonError, match=f"{path} changed while it was read"):
        build_engines(bundle, tmp_path / "out", options, progress=write)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_link_out_of_the_bundle_is_not_copied(engines: Engines, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(engines()[0], tmp_path / "bundle"))
    (tmp_path / "secret").write_text("mine")
    (bundle / "processor" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes.txt is a link to .*secret, outside"):
        build_engines(bundle, tmp_path / "out", Options(target="sm89", graphs=("embed",)))
    assert not (tmp_path / "out").exists()
