"""What overflows fp16 is measured on real images, named, and kept in fp32; nothing else is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import has_tokenizer, tiny_checkpoint
from command import run
from exporters.calibration import measure as measuring
from exporters.calibration.calibrate import calibrate_float16
from exporters.calibration.widen import WidenToFloat32
from exporters.export import export_bundle
from exporters.onnx.manifest import Manifest
from exporters.validation.validate import validate_pair
from pairs import MAX_LENGTH, PVM, Pair, open_gates
from patching import apply
from surgeon.errors import BundleError
from surgeon.inputs import Prompt

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="images and prompts need the demo's tokenizer")

VISION_MLP = {
    "visual.blocks.1.mlp.gate_proj.weight": 2.0**4,
    "visual.blocks.1.mlp.up_proj.weight": 2.0**11,
    "visual.blocks.1.mlp.down_proj.weight": 2.0**-10,
}
"""The product of gate and projection overflows, what comes after it does not."""
RESIDUAL = {"language_model.layers.1.mlp.down_proj.weight": 2.0**14}
"""The stream overflows from layer 1 on, and the graft at layer 2 reads it."""


def scaled(checkpoint: Path, factors: Mapping[str, float]) -> Path:
    """Scale some weights of a checkpoint, in place."""
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        matching = [(name, f) for name in tensors for ending, f in factors.items() if name.endswith(ending)]
        if matching:
            file.unlink()  # never write into a file that may share its bytes
            save_file(tensors | {name: tensors[name] * factor for name, factor in matching}, file, {"format": "pt"})
    return checkpoint


@dataclass(frozen=True)
class OverflowingModel:
    checkpoint: Path
    widened: Path
    plain: Path


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OverflowingModel]:
    """make("vision") or make("residual"): a checkpoint that overflows there, and its bundles."""

    @cache
    def get(kind: str) -> OverflowingModel:
        folder = tmp_path_factory.mktemp(kind)
        if kind == "vision":
            checkpoint = scaled(tiny_checkpoint(folder / "source", "qwen2_5_vl", num_hidden_layers=2), VISION_MLP)
        else:
            tiny_checkpoint(folder / "source", "qwen3_vl", num_hidden_layers=3)
            apply(folder / "source", folder / "patched", *PVM)
            open_gates(folder / "patched")
            checkpoint = scaled(folder / "patched", RESIDUAL)
        for name, measure in (("plain", False), ("widened", True)):
            export_bundle(checkpoint, folder / name, dtype=torch.float16, max_length=MAX_LENGTH, measure=measure)
        return OverflowingModel(checkpoint, folder / "widened", folder / "plain")

    return get


@pytest.fixture(params=["vision", pytest.param("residual", marks=pytest.mark.long)])
def overflowing(request: pytest.FixtureRequest, make: Callable[[str], OverflowingModel]) -> OverflowingModel:
    return make(request.param)


def test_without_fp32_it_is_infinite_and_with_it_the_level_holds(overflowing: OverflowingModel) -> None:
    broken = validate_pair(overflowing.checkpoint, overflowing.plain, steps=3)
    with_image = [case for case in broken.comparisons[0].cases if case.images]
    assert with_image and all("infinite" in case.failures[0] for case in with_image)
    report = validate_pair(overflowing.checkpoint, overflowing.widened, steps=3)
    assert report.comparisons[0].level.name == "fp16" and report.passed, report.to_json()


def test_the_layers_are_named_with_what_was_seen(overflowing: OverflowingModel) -> None:
    precision = Manifest.load(overflowing.widened).precision
    assert precision is not None and precision.prompts == 5 and precision.skipped is None
    widened = {(each.graph, each.layer, each.operator) for each in precision.widened}
    assert all(each.max_abs * precision.margin > precision.limit for each in precision.widened)
    if "residual" in overflowing.widened.parent.name:
        layers = "model.language_model.layers."
        assert {layer for _, layer, _ in widened} == {f"{layers}1", f"{layers}2"}
        assert ("decoder", f"{layers}1", "Gemm mlp.down_proj") in widened
        assert ("decoder", f"{layers}2", "Gemm pvm.text_proj") in widened, "the graft's inside is measured too"
    else:
        assert widened == {("vision", "model.visual.blocks.1", "Mul after mlp.up_proj")}
    largest = max(precision.largest, key=lambda each: each.max_abs)
    assert largest.max_abs == max(each.max_abs for each in precision.widened)


def test_attention_and_weights_stay_as_they_are(overflowing: OverflowingModel) -> None:
    for name in ("vision", "decoder"):
        plain, widened = (ir.load(path / f"{name}.onnx") for path in (overflowing.plain, overflowing.widened))
        for value in plain.graph.initializers.values():
            kept = widened.graph.initializers[str(value.name)].const_value
            assert kept is not None and value.const_value is not None
            assert kept.dtype == value.const_value.dtype
            if isinstance(value.const_value, ir.ExternalTensor):
                assert isinstance(kept, ir.ExternalTensor)
                assert (kept.location, kept.offset) == (value.const_value.location, value.const_value.offset)
        for node in widened.graph:
            if node.op_type in ("Attention", "TensorScatter"):
                assert node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT16
        for a, b in zip(plain.graph.outputs, widened.graph.outputs, strict=True):
            assert (a.name, a.dtype) == (b.name, b.dtype)


def test_what_fits_is_left_alone(export: Callable[..., Pair], tmp_path: Path) -> None:
    pair = export("qwen3_vl", PVM, torch.float16)
    precision = pair.manifest.precision
    assert precision is not None and precision.prompts == 5 and not precision.widened
    assert {each.graph for each in precision.largest} == {"vision", "memory", "decoder"}
    assert all(0 < each.max_abs < 1000 for each in precision.largest)
    plain = export_bundle(
        pair.checkpoint, tmp_path / "plain", dtype=torch.float16, max_length=MAX_LENGTH, measure=False
    )
    assert {name: graph.sha256 for name, graph in plain.graphs.items()} == {
        name: graph.sha256 for name, graph in pair.manifest.graphs.items()
    }


def test_bf16_is_not_measured(make: Callable[[str], OverflowingModel], tmp_path: Path) -> None:
    checkpoint = make("vision").checkpoint
    manifest = export_bundle(checkpoint, tmp_path / "bundle", dtype=torch.bfloat16, max_length=MAX_LENGTH)
    assert manifest.precision is None
    assert validate_pair(checkpoint, tmp_path / "bundle", steps=3).passed


def test_the_measurement_is_what_torch_computes(export: Callable[..., Pair]) -> None:
    """The decoder's largest stream and logits against hooks on the model itself."""
    pair = export("qwen3_vl", PVM, torch.float16)
    maxima, prompts = measuring.measure(pair.bundle)
    measured = {each.value: each.max_abs for each in maxima if each.graph == "decoder"}
    seen = {}
    layers = pair.model.model.language_model.layers
    hooks = [
        layer.register_forward_hook(
            lambda _, __, output, i=i: seen.update({i: max(seen.get(i, 0.0), float(output.detach().abs().max()))})
        )
        for i, layer in enumerate(layers)
    ]
    runtime = measuring._MeasuringRuntime(pair.bundle)
    asked = measuring._prompts(runtime)
    assert len(asked) == prompts
    with torch.no_grad():
        for prompt in asked:
            pair.model(**pair.inputs.prepare([prompt]).model_kwargs(), use_cache=False)
    for hook in hooks:
        hook.remove()
    for i in (1, 2):
        assert measured[f"hidden_states.{i}"] == pytest.approx(seen[i], rel=1e-2)


def test_the_order_of_prompts_changes_nothing(export: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are the largest over all prompts, whichever has them."""
    pair = export("qwen3_vl", PVM, torch.float16)
    prompts = measuring._prompts(measuring._MeasuringRuntime(pair.bundle))
    with_images, words = prompts[0], next(prompt for prompt in prompts if not prompt.images)
    largest = []
    for order in ([with_images, words], [words, with_images]):
        monkeypatch.setattr(measuring, "_prompts", lambda runtime, order=order: order)
        maxima, _ = measuring.measure(pair.bundle)
        largest.append({(each.graph, each.value): each.max_abs for each in maxima})
    assert largest[0] == largest[1]


def test_the_command_says_which_and_why(
    make: Callable[[str], OverflowingModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make("vision").checkpoint
    arguments = ["export", str(checkpoint), str(tmp_path / "bundle"), "--dtype", "fp16", "--max-length", "256"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "fp32, because 4 times the value is beyond fp16" in result.stdout
    assert "Mul after mlp.up_proj" in result.stdout
    monkeypatch.setattr(measuring, "_free_memory", lambda: 1000)
    without = run(*arguments, "--overwrite")
    assert without.exit_code == 0 and "was not measured: it takes about" in without.stderr


def test_what_cannot_be_measured_is_said(
    export: Callable[..., Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = export("qwen3_vl", PVM, torch.float16)
    options = {"dtype": torch.float16, "max_length": MAX_LENGTH, "graphs": ["embed"]}
    alone = export_bundle(pair.checkpoint, tmp_path / "embed", **options)
    assert alone.precision is not None and alone.precision.skipped == "the bundle has no decoder graph"
    not_asked = export_bundle(pair.checkpoint, tmp_path / "not", **options, measure=False)
    assert not_asked.precision is not None and not_asked.precision.skipped == "it was not asked for"
    monkeypatch.setattr(measuring, "_prompts", lambda runtime: [Prompt("word " * MAX_LENGTH)])
    precision, graphs = calibrate_float16(pair.bundle)
    assert precision.skipped == f"no prompt of the validator fits in max_length {MAX_LENGTH}" and not graphs


def test_weights_that_are_broken_in_any_dtype_are_told(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=2)
    scaled(source, {"language_model.layers.1.mlp.up_proj.weight": float("nan")})
    with pytest.raises(BundleError, match=r"language_model\.layers\.1 .*not finite in fp32"):
        export_bundle(source, tmp_path / "bundle", dtype=torch.float16, max_length=MAX_LENGTH)
    assert not (tmp_path / "bundle").exists()


def test_what_attention_would_take_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_vl", num_hidden_layers=2)
    scaled(source, {"language_model.layers.1.self_attn.v_proj.weight": 2.0**16})
    with pytest.raises(BundleError, match=r"layers\.1 \(Gemm self_attn\.v_proj\).*bf16"):
        export_bundle(source, tmp_path / "bundle", dtype=torch.float16, max_length=MAX_LENGTH)


@pytest.mark.parametrize("overflowing", ["y", "wide"])
def test_what_the_next_graph_would_take_is_refused(overflowing: str) -> None:
    """An output of the graph, or what is reshaped into one."""
    text = """<ir_version: 10, opset_import: ["": 24]>
    features (float16[B, 4] x, float16[4, 4] w, int64[2] shape) => (float16[B, 4] y) {
        wide = MatMul (x, w)
        y = Reshape (wide, shape)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    with pytest.raises(BundleError, match=r"it leaves features\.onnx.*bf16"):
        WidenToFloat32([overflowing])(model)
