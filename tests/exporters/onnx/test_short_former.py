"""short_former.onnx against the short former in torch, for every family that names a tower."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image

from checkpoints import has_tokenizer, tiny_checkpoint, tiny_model
from exporters.onnx.short_former import short_former_graph
from short_formers import (
    NUM_LATENTS,
    NUM_QUERIES,
    WITH_TOWER,
    graft_former,
    one_request,
    square_images,
    tiny_former,
    tiny_queries,
)
from small_graphs import session
from surgeon import models
from surgeon.errors import FamilyError
from surgeon.families import Family, family
from surgeon.inputs import Inputs, Prompt
from surgeon.memory.short_former import ShortFormer

every_tower = pytest.mark.parametrize("model_type", WITH_TOWER)


def image(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


ONE = Prompt("What is it?", (image(96, 64, 0),))
TWO = Prompt("Compare them.", (image(64, 64, 1), image(330, 60, 2)))
THREE = Prompt("And these?", (image(40, 280, 3), image(42, 42, 4), image(64, 130, 5)))


def onnx_graph(model: Any) -> ir.Model:
    """The graph of a model's short former, traced without weights, with the model's."""
    without_weights = copy.deepcopy(model).to("meta")
    former = without_weights.model.vismem.short
    graph = short_former_graph(family(model.config.model_type), without_weights, former, NUM_QUERIES, model.dtype)
    for name, value in graph.graph.initializers.items():
        if value.const_value is None:
            values = model.get_parameter(name).detach().numpy().reshape(tuple(value.shape or ()))
            value.const_value = ir.tensor(values, name=name)
    return graph


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
@every_tower
def test_the_graph_computes_the_short_former(shared: Callable[..., Path], model_type: str) -> None:
    """For one image, and for several of different sizes; tiles of the families that cut them included."""
    folder = shared(
        f"plain {model_type}", lambda path: tiny_checkpoint(path / "source", model_type, num_hidden_layers=3)
    )
    model: Any = models.load(folder / "source")
    former, queries = graft_former(model, tiny_former(model)), tiny_queries(model)
    graph = onnx_graph(model)
    inputs, described = Inputs.from_directory(folder / "source"), family(model_type)
    run = session(graph)
    assert [port.name for port in run.get_outputs()] == ["latents"]
    assert run.get_outputs()[0].shape == [1, NUM_LATENTS, queries.shape[1]]
    for prompt in (ONE, TWO, THREE):
        prepared = inputs.prepare([prompt])
        images = list(zip(prepared.pixel_values[0], prepared.grids[0], strict=True))
        feeds = {"queries": queries.numpy()[None], **described.short_former_inputs(model.config, images)}
        assert [port.name for port in run.get_inputs()] == list(feeds)
        (latents,) = run.run(None, feeds)
        np.testing.assert_allclose(latents[0], in_torch(model, former, prepared), rtol=1e-5, atol=1e-5)

    used = {value.name for node in graph.graph for value in node.inputs if value is not None}
    assert used >= graph.graph.initializers.keys()
    own = {name for name, _ in model.named_parameters() if name.startswith("model.vismem.")}
    assert own <= graph.graph.initializers.keys()
    assert not [name for name in graph.graph.initializers if "deepstack" in name or "newline" in name]


@torch.no_grad()
def in_torch(model: Any, former: ShortFormer, prepared: Any) -> np.ndarray:
    kwargs = prepared.model_kwargs()
    visual = torch.from_numpy(prepared.mm_token_type_ids == 1)
    (images,) = former.tower.images_by_row(model.model, kwargs, visual)
    latents: np.ndarray = former(model.model, images, tiny_queries(model)).numpy()
    return latents


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen2_5_vl", {"vision": {"fullatt_block_indexes": [0, 2]}}),
        ("internvl", {"top": {"vision_feature_layer": -2}}),
        ("internvl", {"vision": {"use_qk_norm": True, "norm_type": "rms_norm"}}),
        ("internvl", {"vision": {"use_mean_pooling": False}}),
        ("llava_onevision", {"top": {"vision_feature_layer": -2}}),
        ("ovis2", {"vision": {"tokenize_function": "st_argmax"}}),
        ("ovis2", {"vision": {"hidden_stride": 3}}),
    ],
)
def test_what_is_written_out_computes_the_short_former(model_type: str, options: dict[str, Any]) -> None:
    model: Any = tiny_model(model_type, **options)
    former = graft_former(model, tiny_former(model))
    written_out, expected = both(model, former)
    torch.testing.assert_close(written_out, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def both(model: Any, former: ShortFormer) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents of two images: of what is written out for export, and of the former."""
    described, queries = family(model.config.model_type), tiny_queries(model)
    images = square_images(model, 6, 20)
    export = described.short_former_export(model, former, NUM_QUERIES, model.dtype)
    inputs = described.short_former_inputs(model.config, images)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
    tensors["pixel_values"] = tensors["pixel_values"].to(model.dtype)
    (latents,) = export.module(queries=queries[None], **tensors)
    return latents[0], former(model.model, one_request(model, images)[1], queries)


@every_tower
def test_what_is_written_out_in_bf16_is_near_the_short_former(model_type: str) -> None:
    model: Any = tiny_model(model_type, torch.bfloat16)
    written_out, in_bf16 = both(model, graft_former(model, tiny_former(model)))
    exact: Any = tiny_model(model_type)
    _, expected = both(exact, graft_former(exact, tiny_former(exact)))
    assert written_out.dtype == torch.bfloat16
    assert (written_out.float() - expected).abs().mean() < 1.3 * (in_bf16.float() - expected).abs().mean()


@every_tower
def test_every_parameter_is_the_models_own(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    former = graft_former(model, tiny_former(model))
    export = family(model_type).short_former_export(model, former, NUM_QUERIES, torch.float32)
    whole = dict(model.named_parameters())
    for name, parameter in export.module.named_parameters():
        source = whole[export.parameters[name]]
        assert parameter.data_ptr() == source.data_ptr() and parameter.numel() == source.numel(), name
    assert dict(export.module.named_buffers()).keys() == export.constants.keys()
    assert {f"model.vismem.short.{name}" for name, _ in former.named_parameters()} <= set(export.parameters.values())


@every_tower
def test_a_former_of_another_dtype_is_refused(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    former = graft_former(model, tiny_former(model).bfloat16())
    with pytest.raises(ValueError, match=r"the short former is of torch.bfloat16, the graph is to be torch.float32"):
        family(model_type).short_former_export(model, former, NUM_QUERIES, torch.float32)


def test_a_random_vocabulary_is_refused() -> None:
    model: Any = tiny_model("ovis2", vision={"tokenize_function": "gumbel_argmax"})
    former = graft_former(model, tiny_former(model))
    with pytest.raises(FamilyError, match="it is random"):
        family("ovis2").short_former_export(model, former, NUM_QUERIES, torch.float32)


def test_a_family_without_a_tower_has_no_short_former() -> None:
    model: Any = tiny_model("ovis2")
    with pytest.raises(FamilyError, match="family ovis2 has no short former"):
        Family.short_former_export(family("ovis2"), model, tiny_former(model), NUM_QUERIES, torch.float32)
    with pytest.raises(FamilyError, match="family ovis2 has no short former"):
        Family.short_former_inputs(family("ovis2"), model.config, square_images(model, 6))
