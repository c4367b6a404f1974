"""Mixin layers on every family: exactly nothing at insertion, and positions as the backbone's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import has_tokenizer, tiny_checkpoint
from patching import apply, randomise_grafts
from surgeon import models
from surgeon.families import supported
from surgeon.inputs import Inputs, Prompt
from surgeon.memory.rotary import split_axes

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")


def image(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


PROMPTS = (
    Prompt("What is it?", (image(96, 64, 0),)),
    Prompt("hello there"),
    Prompt("Compare.", (image(64, 64, 1), image(90, 130, 2))),
)


@pytest.mark.parametrize("model_type", supported())
def test_identity_at_insertion_in_bf16(model_type: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", model_type, torch.bfloat16)
    apply(source, tmp_path / "patched", "mixin:every=2", "pvm:layers=1,latent=32")
    plain, patched = models.load(source), models.load(tmp_path / "patched")
    kwargs = Inputs.from_directory(source).prepare(PROMPTS).model_kwargs(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(plain(**kwargs).logits, patched(**kwargs).logits)
    tokens = [model.generate(**kwargs, max_new_tokens=6, do_sample=False).tolist() for model in (plain, patched)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("model_type", supported())
def test_a_batch_is_its_rows_alone_and_keys_turn_with_the_familys_positions(model_type: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", model_type)
    apply(source, tmp_path / "patched", "mixin:every=2")
    model = models.load(tmp_path / "patched")
    randomise_grafts(model)
    inputs = Inputs.from_directory(tmp_path / "patched")

    def generate(*prompts: Prompt) -> list[list[int]]:
        kwargs = inputs.prepare(prompts).model_kwargs()
        generated = model.generate(**kwargs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return generated[:, -6:].tolist()

    assert generate(*PROMPTS) == [generate(prompt)[0] for prompt in PROMPTS]

    prepared = inputs.prepare(PROMPTS[-1:])
    kwargs = prepared.model_kwargs()
    with torch.no_grad():
        cache = model(**kwargs, use_cache=True).past_key_values
        text = model.get_submodule(inputs.family.text_model)
        # the visual embeddings as they entered the decoder, whatever the family did to them
        entered: list[torch.Tensor] = []
        project = text.layers[1].mixin.project
        text.layers[1].mixin.project = lambda v, r: entered.append(v) or project(v, r)  # type: ignore[func-returns-value]
        model(**kwargs, use_cache=True)
        del text.layers[1].mixin.project
        ids, _ = inputs.family.position_ids(inputs.config, prepared.input_ids, prepared.attention_mask, prepared.grids)
        visual = kwargs["input_ids"][0] == inputs.family.image_token_id(inputs.config)
        positions = split_axes(torch.from_numpy(ids), 1)[:, :, visual]
        keys, _ = text.layers[1].mixin.project(entered[0], text.layers[1].mixin.rope(positions))
    torch.testing.assert_close(cache.layers[-1].entries["1.mixin"][0], keys, atol=1e-5, rtol=0)
