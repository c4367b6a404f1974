"""The authors' numbers, from exported bundles."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.export import export_bundle
from exporters.onnxruntime import BundleRuntime
from golden import expected_tensors, published_checkpoint
from published import IMAGE_TOKEN_ID, golden_checkpoint
from published import expected_tensors as expected_internvl
from surgeon.importing import import_checkpoint
from surgeon.inputs import ModelInputs
from surgeon.positions import Positions, position_ids


def test_logits_and_greedy_tokens_of_the_published_pvm_model(tmp_path: Path) -> None:
    checkpoint = published_checkpoint(tmp_path / "checkpoint")
    export_bundle(checkpoint, tmp_path / "bundle", dtype=torch.float32, max_length=40)
    runtime = BundleRuntime(tmp_path / "bundle")
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


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], BundleRuntime]:
    """The published InternVL2 or CoMemo, imported and exported."""
    runtimes: dict[str, BundleRuntime] = {}

    def get(name: str) -> BundleRuntime:
        if name not in runtimes:
            folder = tmp_path_factory.mktemp(name)
            source = golden_checkpoint(folder / "source", name)
            import_checkpoint(source, folder / "checkpoint", image_token_id=IMAGE_TOKEN_ID)
            export_bundle(folder / "checkpoint", folder / "bundle", dtype=torch.float32, max_length=1064)
            runtimes[name] = BundleRuntime(folder / "bundle")
        return runtimes[name]

    return get


@pytest.mark.parametrize(
    ("name", "positions", "key"),
    [("internvl2", None, "internvl2"), ("comemo", "plain", "comemo_plain"), ("comemo", "dhr", "comemo_dhr")],
)
def test_published_internvl2_and_comemo(
    imported: Callable[[str], BundleRuntime], name: str, positions: Positions | None, key: str
) -> None:
    runtime, expected = imported(name), expected_internvl()
    grids = [(1, rows, columns) for columns, rows in expected["grids_columns_rows"].tolist()]
    layout = runtime.family.tile_layout(runtime.config)
    assert layout is not None
    counts = np.cumsum([layout.tiles(grid) for grid in grids])[:-1]
    ids = expected["input_ids"].numpy()
    inputs = ModelInputs(
        family=runtime.family,
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE_TOKEN_ID).astype(np.int64),
        pixel_values=[np.split(expected["pixel_values"].numpy(), counts)],
        grids=[grids],
        positions=positions,
    )
    features = np.concatenate([image.features for image in runtime.encode_images(inputs)[0]])
    np.testing.assert_allclose(features, expected["visual_embeds"][0].numpy(), atol=1e-5, rtol=0)
    known = (runtime.family, runtime.config, ids, inputs.attention_mask, inputs.grids, positions)
    token_positions, following = position_ids(*known)
    if positions == "dhr":
        assert np.array_equal(token_positions[0], expected["dhr_position_ids"].numpy())
        assert np.array_equal(token_positions[0][ids == IMAGE_TOKEN_ID], expected["dhr_media_position_ids"][0].numpy())
    state, logits = runtime.start(inputs, logits="all")
    np.testing.assert_allclose(logits[:, -64:], expected[f"logits_{key}"].numpy(), atol=1e-4, rtol=0)
    assert state.next_positions.tolist() == following.tolist()
