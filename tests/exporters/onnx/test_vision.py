"""vision.onnx and embed.onnx against transformers, on images of several sizes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pairs import Pair
from surgeon import models
from surgeon.families import family


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen2_5_vl"])
def test_one_graph_takes_images_of_any_size(export: Callable[..., Pair], model_type: str) -> None:
    exported = export(model_type)
    model = models.load(exported.checkpoint)
    described = family(model_type)
    session = exported.session("vision")
    vision = model.config.vision_config
    for grid in ((1, 4, 4), (1, 10, 6), (1, 2, 16)):
        pixels = np.random.default_rng(grid[1]).standard_normal(
            (grid[1] * grid[2], 3 * vision.temporal_patch_size * vision.patch_size**2), dtype=np.float32
        )
        feeds = described.vision_inputs(model.config, pixels, grid)
        names = [output.name for output in session.get_outputs()]
        got = dict(zip(names, session.run(None, feeds), strict=True))
        with torch.inference_mode():
            want = model.model.visual(torch.from_numpy(pixels), grid_thw=torch.tensor([grid]), return_dict=True)
        assert np.abs(got["features"] - want.pooler_output.numpy()).max() < 1e-4
        if exported.manifest.sizes.deepstack:
            assert np.abs(got["deepstack"] - torch.stack(want.deepstack_features).numpy()).max() < 1e-4


def test_embeddings_are_rows_of_the_table(export: Callable[..., Pair]) -> None:
    exported = export("qwen3_vl")
    model = models.load(exported.checkpoint)
    ids = np.array([[1, 5, 2047], [0, 0, 7]])
    got = exported.session("embed").run(None, {"input_ids": ids})[0]
    assert np.array_equal(got, model.get_input_embeddings()(torch.from_numpy(ids)).detach().numpy())
