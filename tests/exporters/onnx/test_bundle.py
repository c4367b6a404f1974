"""The bundle: weights are pointed into, not copied; other dtypes are converted once; what cannot be is reported."""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import tiny_checkpoint
from exporters.export import export_bundle
from exporters.onnx import bundle
from exporters.onnx.manifest import Manifest
from pairs import MAX_LENGTH, MIXIN, PLAIN, PVM, DecoderRun, Pair
from surgeon.checkpoint import read_header, share_file
from surgeon.errors import BundleError, CheckpointError, OptionError, SurgeonError, TargetError

Export = Callable[..., Pair]


def external(directory: Path) -> dict[str, dict[str, str]]:
    """Every external initialiser of a bundle's graphs -> where it is."""
    locations = {}
    for path in directory.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == tensor.EXTERNAL:
                locations[tensor.name] = {entry.key: entry.value for entry in tensor.external_data}
    return locations


def shares_bytes(checkpoint: Path, bundle: Path, name: str) -> bool:
    """Whether the bundle's weight file is the checkpoint's own: one inode, or blocks shared by a reflink."""
    how = Manifest.load(bundle).weights[f"weights/{name}"].how
    return how == "reflink" or (bundle / "weights" / name).stat().st_ino == (checkpoint / name).stat().st_ino


@pytest.mark.parametrize("recipe", [PVM, MIXIN + PVM], ids=["pvm", "mixin and pvm"])
def test_weights_stay_where_they_are(export: Export, recipe: tuple[str, ...]) -> None:
    exported = export("qwen3_vl", recipe)
    assert {w.how for w in exported.manifest.weights.values()} <= {"reflink", "hardlink"}
    for path in exported.checkpoint.glob("*.safetensors"):
        assert shares_bytes(exported.checkpoint, exported.bundle, path.name)
    where = external(exported.bundle)
    stored = {name: info for f in exported.checkpoint.glob("*.safetensors") for name, info in read_header(f).items()}
    assert set(where) == {name for name in stored}
    for name, info in stored.items():
        assert where[name]["location"] == f"weights/{info.file.name}"
        assert (int(where[name]["offset"]), int(where[name]["length"])) == (info.offset, info.nbytes)
    # tables of rotary frequencies and shapes alone are inside
    for path in exported.bundle.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            assert tensor.data_location == tensor.EXTERNAL or len(tensor.SerializeToString()) < 500


def test_a_hub_cache_of_symlinks_and_shards(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", sharded=True)
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (blobs := tmp_path / "cache" / "blobs").mkdir()
    for i, path in enumerate(source.iterdir()):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(i), snapshot))
    manifest = export_bundle(snapshot, tmp_path / "bundle", dtype=torch.float32, max_length=16, graphs=["embed"])
    assert list(manifest.graphs) == ["embed"]
    assert len(manifest.weights) == 1, "only the shard that holds the embeddings is needed"
    (name,) = manifest.weights
    assert not (tmp_path / "bundle" / name).is_symlink()


def test_on_another_file_system_weights_are_copied_and_the_manifest_says_so(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    checkpoint = export("qwen3_vl").checkpoint
    manifest = export_bundle(checkpoint, tmp_path / "bundle", dtype=torch.float32, max_length=16, graphs=["embed"])
    ((path, weights),) = manifest.weights.items()
    assert weights.how == "copy"
    assert (tmp_path / "bundle" / path).read_bytes() == (checkpoint / Path(path).name).read_bytes()
    # with one link only, onnx's own checker takes the file too
    onnx.checker.check_model(tmp_path / "bundle" / "embed.onnx")


def test_another_dtype_is_converted_once(export: Export) -> None:
    exported = export("qwen3_vl", PVM, torch.float16)
    ((path, weights),) = exported.manifest.weights.items()
    assert (path, weights.how) == ("weights/converted-f16.safetensors", "converted")
    converted, where = load_file(exported.bundle / path), external(exported.bundle)
    assert set(where) == set(converted)
    source = {k: v for f in exported.checkpoint.glob("*.safetensors") for k, v in load_file(f).items()}
    for name, tensor in converted.items():
        assert torch.equal(tensor, source[name].half())
    # and the graphs are of that dtype, and run
    run = DecoderRun(exported, 1)
    assert run.caches["past_keys.0"].dtype == np.float16
    embeds = np.random.default_rng(0).standard_normal((1, 4, exported.manifest.sizes.hidden_size)).astype(np.float16)
    feeds = {"position_ids": np.tile(np.arange(4), (3, 1, 1)), "logits_indices": np.array([[3]])}
    got = run.step(inputs_embeds=embeds, **feeds)
    want = DecoderRun(export("qwen3_vl"), 1).step(inputs_embeds=embeds.astype(np.float32), **feeds)
    assert got.dtype == np.float16
    assert np.abs(got - want).max() < 0.05 < want.std()
    for graph in exported.manifest.graphs:
        exported.session(graph)


def test_bf16_weights_are_pointed_into_by_a_bf16_graph(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen2_5_vl", torch.bfloat16)
    graphs = ["memory", "embed"]
    manifest = export_bundle(source, tmp_path / "bundle", dtype=torch.bfloat16, max_length=16, graphs=graphs)
    assert list(manifest.graphs) == ["embed"], "a plain model has no memory"
    assert shares_bytes(source, tmp_path / "bundle", "model.safetensors")
    assert manifest.graphs["embed"].outputs[0].dtype == "bfloat16"


def test_tied_embeddings_are_one_tensor(export: Export) -> None:
    exported = export("qwen2_5_vl", PLAIN, tie_word_embeddings=True)
    model = onnx.load(exported.bundle / "decoder.onnx", load_external_data=False)
    logits = [node for node in model.graph.node if node.op_type == "Gemm"][-1]
    assert logits.input[1] == "model.language_model.embed_tokens.weight"
    DecoderRun(exported, 1)


def test_the_manifest_says_what_a_runtime_needs(export: Export) -> None:
    exported = export("qwen3_vl")
    manifest = exported.manifest
    assert manifest.max_length == MAX_LENGTH and manifest.source.grafts[0]["kind"] == "pvm"
    assert [(m.layer, m.kind, m.num_key_value_heads, m.head_dim) for m in manifest.memory] == [
        (1, "pvm", 1, 16),
        (2, "pvm", 1, 16),
    ]
    assert set(manifest.graphs) == {"embed", "vision", "memory", "decoder"}
    for name, graph in manifest.graphs.items():
        session = exported.session(name)
        for described, values in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
            assert [(p.name, p.shape) for p in described] == [(v.name, v.shape) for v in values]
    config = json.loads((exported.bundle / "processor" / "config.json").read_text())
    assert config == json.loads((exported.checkpoint / "config.json").read_text())


def test_older_key_layouts_are_found(export: Export, tmp_path: Path) -> None:
    """Qwen2.5-VL's published checkpoints have `visual.` and `model.layers.`."""
    source = tiny_checkpoint(tmp_path / "source", "qwen2_5_vl")
    file = source / "model.safetensors"
    old = {
        k.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v
        for k, v in load_file(file).items()
    }
    assert "visual.merger.ln_q.weight" in old and "model.layers.0.mlp.up_proj.weight" in old
    save_file(old, file, {"format": "pt"})
    export_bundle(source, tmp_path / "bundle", dtype=torch.float32, max_length=16, graphs=["embed", "decoder"])
    where = external(tmp_path / "bundle")["model.language_model.layers.0.mlp.up_proj.weight"]
    assert int(where["offset"]) == read_header(file)["model.layers.0.mlp.up_proj.weight"].offset


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


EMBEDDINGS = "model.language_model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "dtype", "kind", "message"),
    [
        (lambda t: t.pop(EMBEDDINGS), torch.float32, CheckpointError, EMBEDDINGS),
        (lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS][:100].clone()}), torch.float32, CheckpointError, r"\[100, 64\]"),
        (lambda t: t[EMBEDDINGS].mul_(1e6), torch.float16, BundleError, "bf16"),
        (lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].char()}), torch.float32, CheckpointError, "int8"),
    ],
)
def test_weights_that_cannot_be_used_are_named(
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    dtype: torch.dtype,
    kind: type[Exception],
    message: str,
) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    rewrite(source, change)
    with pytest.raises(kind, match=message):
        export_bundle(source, tmp_path / "bundle", dtype=dtype, max_length=16, graphs=["embed"])
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing is left behind"


def test_what_cannot_be_asked_is_refused_before_anything_is_written(export: Export, tmp_path: Path) -> None:
    checkpoint, target = export("qwen3_vl").checkpoint, tmp_path / "bundle"
    for options, kind, message in (
        ({"dtype": torch.int8, "max_length": 16}, OptionError, "fp16"),
        ({"dtype": torch.float32, "max_length": 1}, OptionError, "2 to 4096"),
        ({"dtype": torch.float32, "max_length": 5000}, OptionError, "2 to 4096"),
        ({"dtype": "fp8"}, OptionError, "graphs of fp8; choose one of fp32, fp16, bf16"),
        ({"dtype": torch.float32, "max_length": 16, "graphs": ["decode"]}, OptionError, "decode"),
    ):
        with pytest.raises(kind, match=message):
            export_bundle(checkpoint, target, **options)
    with pytest.raises(TargetError):
        export_bundle(checkpoint, checkpoint / "bundle", dtype=torch.float32, max_length=16)
    with pytest.raises(OptionError, match="holds a bundle, not a checkpoint"):
        export_bundle(export("qwen3_vl").bundle, target, dtype=torch.float32)
    target.mkdir()
    with pytest.raises(TargetError, match="--overwrite"):
        export_bundle(checkpoint, target, dtype=torch.float32, max_length=16)
    assert not list(target.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["shared", "converted"])
def test_a_source_that_is_cut_short_while_it_is_read_leaves_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    weights = source / "model.safetensors"

    def cut(stage: str, done: int, total: int) -> None:
        if stage == "weight files" or stage.startswith("converting"):
            os.truncate(weights, 500_000)

    with pytest.raises(SurgeonError, match=f"{weights}.* while it was read"):
        export_bundle(source, tmp_path / "out", dtype=dtype, max_length=16, graphs=["embed", "decoder"], progress=cut)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_side_file_that_changes_while_it_is_read_leaves_nothing(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")

    def cut(stage: str, done: int, total: int) -> None:
        os.truncate(source / "tokenizer.json", 100)

    with pytest.raises(TargetError, match=r"out was not written.*tokenizer.json changed while it was read, from"):
        export_bundle(
            source, tmp_path / "out", dtype=torch.float32, max_length=16, graphs=["embed"], progress=cut, measure=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("damage", ["offset", "cut"])
def test_what_was_staged_is_read_before_it_is_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl")
    placed = bundle.bind

    def bind(graphs: Any, model: Any, checkpoint: Any, directory: Path, progress: Any) -> Any:
        done = placed(graphs, model, checkpoint, directory, progress)
        if damage == "cut":  # before the manifest describes what is there
            weights = directory / done[0].path
            weights.write_bytes(weights.read_bytes()[:-4])  # a file of its own, not the source's
            return done
        (value,) = (v for v in graphs for v in v.graph.initializers.values() if v.const_value.offset)
        tensor = value.const_value
        value.const_value = ir.ExternalTensor(
            tensor.location,
            tensor.offset + 4,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=directory,
        )
        return done

    monkeypatch.setattr(bundle, "bind", bind)
    monkeypatch.setattr("exporters.onnx.weights.share_file", lambda file, to, mode: share_file(file, to, "copy"))
    message = "takes .* where no tensor of that size lies" if damage == "offset" else "truncated"
    with pytest.raises(TargetError, match=f"out was not written, because .*{message}"):
        export_bundle(source, tmp_path / "out", dtype=torch.float32, max_length=16, graphs=["embed"])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
