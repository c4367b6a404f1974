"""Embeddings that images were already put into: nothing in them tells an image's token from a text's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from checkpoints import tiny_checkpoint
from patching import apply, randomise_grafts
from surgeon import models
from surgeon.inputs import Inputs, Prompt

PROMPTS = (Prompt("What is it?", (Image.new("RGB", (90, 42), (200, 30, 40)),)), Prompt("hello there"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    directory: Path = tmp_path_factory.mktemp("merged")
    source = tiny_checkpoint(directory / "source", "internvl")
    apply(source, directory / "patched", "pvm:layers=1,2,latent=32")
    model = models.load(directory / "patched")
    randomise_grafts(model)
    return model


@pytest.fixture
def kwargs(model: PreTrainedModel) -> dict[str, Any]:
    return Inputs.from_directory(model.name_or_path).prepare(PROMPTS).model_kwargs()


@torch.no_grad()
def merged(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    ids = kwargs["input_ids"]
    visual = ids == model.config.image_token_id
    features = model.model.get_image_features(pixel_values=kwargs["pixel_values"]).pooler_output
    embeds = model.get_input_embeddings()(ids).masked_scatter(visual[..., None], features)
    return {"inputs_embeds": embeds, "attention_mask": kwargs["attention_mask"], "visual_token_mask": visual}


def test_told_where_images_are_they_enter_the_memory(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    own, options = merged(model, kwargs), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        torch.testing.assert_close(model(**own).logits, model(**kwargs).logits, atol=0, rtol=0)
        tokens = model.generate(**kwargs, **options)[:, kwargs["input_ids"].shape[1] :]
        assert torch.equal(model.generate(**own, **options), tokens)


def test_not_told_they_are_refused(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    own = merged(model, kwargs)
    del own["visual_token_mask"]
    for call in (model, model.base_model):
        with pytest.raises(ValueError, match="pass visual_token_mask"):
            call(**own)


def test_text_alone_is_said_to_be(model: PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        logits = model(inputs_embeds=embeds, visual_token_mask=torch.zeros_like(ids, dtype=torch.bool)).logits
        torch.testing.assert_close(logits, model(input_ids=ids).logits, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask.long(), r"torch\.int64 .*: pass torch\.bool"),
        (lambda mask: mask[:, :5], r"\[2, 5\]: pass torch\.bool \[2, "),
        (lambda mask: torch.zeros_like(mask), "False everywhere"),
    ],
    ids=["dtype", "length", "nothing"],
)
def test_a_mask_that_cannot_be_of_these_tokens_is_refused(
    model: PreTrainedModel, kwargs: dict[str, Any], change: Any, message: str
) -> None:
    mask = change(kwargs["input_ids"] == model.config.image_token_id)
    with pytest.raises(ValueError, match=message):
        model(**kwargs, visual_token_mask=mask)
