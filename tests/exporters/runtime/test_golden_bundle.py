"""The PVM authors' numbers, from an exported bundle."""

import numpy as np
import pytest
import torch

from exporters.onnx.bundle import export_bundle
from exporters.runtime import BundleRuntime
from golden import expected_tensors, published_checkpoint
from surgeon.inputs import ModelInputs


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> BundleRuntime:
    directory = tmp_path_factory.mktemp("golden")
    checkpoint = published_checkpoint(directory / "checkpoint")
    export_bundle(checkpoint, directory / "bundle", dtype=torch.float32, max_length=40)
    return BundleRuntime(directory / "bundle")


def test_logits_and_greedy_tokens_of_the_published_model(runtime: BundleRuntime) -> None:
    expected = expected_tensors()
    ids, grid = expected["input_ids"].numpy(), expected["image_grid_thw"].numpy()
    inputs = ModelInputs(
        family=runtime.family,
        input_ids=ids,
        attention_mask=expected["attention_mask"].numpy(),
        mm_token_type_ids=(ids == runtime.family.image_token_id(runtime.config)).astype(np.int64),
        pixel_values=[[expected["pixel_values"].numpy()]],
        grids=[[tuple(grid[0].tolist())]],
    )
    state, logits = runtime.start(inputs, logits="all")
    np.testing.assert_allclose(logits, expected["logits"].numpy(), atol=1e-4, rtol=0)
    tokens = []
    step_logits = logits[:, -1]
    for _ in range(expected["greedy"].shape[1]):
        tokens.append(step_logits.argmax(-1))
        step_logits = runtime.step(state, tokens[-1])
    assert np.stack(tokens, 1).tolist() == expected["greedy"].tolist()
