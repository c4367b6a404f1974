"""CoMemo as published -> internvl with mixin layers and RoPE-DHR."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from published import IMAGE_TOKEN_ID, expected_tensors, golden_checkpoint
from surgeon import models
from surgeon.errors import CheckpointError
from surgeon.importing import import_checkpoint


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("comemo")
    source = golden_checkpoint(directory / "source", "comemo")
    report = import_checkpoint(source, directory / "out", image_token_id=IMAGE_TOKEN_ID)
    assert report.grafts == {"mixin": [3]}
    return directory / "out"


def inputs() -> dict[str, Any]:
    expected = expected_tensors()
    rows_columns = expected["grids_columns_rows"].flip(1)
    return {
        "input_ids": expected["input_ids"],
        "pixel_values": expected["pixel_values"],
        "tile_grids": rows_columns,
    }


@pytest.mark.parametrize("positions", ["dhr", "plain"])
def test_golden_comemo_gives_the_authors_numbers(imported: Path, positions: str) -> None:
    model = models.load(imported)
    with torch.no_grad():
        logits = model(**inputs(), positions=positions).logits[:, -64:]
    torch.testing.assert_close(logits, expected_tensors()[f"logits_comemo_{positions}"], atol=1e-4, rtol=0)


def test_loads_without_this_tool_as_it_was_trained(imported: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(
        imported, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model(**inputs()).logits[:, -64:]
    torch.testing.assert_close(logits, expected_tensors()["logits_comemo_dhr"], atol=1e-4, rtol=0)


def test_the_record_says_how_it_was_trained(imported: Path) -> None:
    record = json.loads((imported / "config.json").read_text())["surgeon"]
    assert record["grafts"] == [
        {
            "kind": "mixin",
            "layers": [3],
            "num_heads": 4,
            "head_dim": 16,
            "intermediate": 128,
            "rope_theta": 1e6,
            "eps": 1e-5,
            "visibility": "all",
        }
    ]
    assert record["positions"] == {"scheme": "rope_dhr", "tile_order": "column"}
    assert record["layout"] == {"side": 16, "thumbnail": "last"}
    assert record["source"]["model_type"] == "comemo_chat"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c.update(use_thumbnail=False), ("thumbnail",)),
        (lambda c: c.update(dynamic_image_size=False), ("thumbnail",)),
        (lambda c: c.pop("mixin_config"), ("mixin_config is missing",)),
        (lambda c: c["mixin_config"].update(mixin_every_n_layers=5), ("mixin_every_n_layers is 5", "4 layers")),
        (lambda c: c["mixin_config"].update(mixin_every_n_layers=2), ("layers.1.mixin",)),
        (lambda c: c["mixin_config"].update(vision_dim=128), ("vision_dim is 128", "64")),
        (lambda c: c["mixin_config"].update(head_dim=8), ("to_kv", "[64, 64]")),
    ],
)
def test_what_cannot_be_converted(tmp_path: Path, change: Any, parts: tuple[str, ...]) -> None:
    source = golden_checkpoint(tmp_path / "in" / "source", "comemo", change=change)
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(source, tmp_path / "out", image_token_id=IMAGE_TOKEN_ID)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not (tmp_path / "out").exists()
