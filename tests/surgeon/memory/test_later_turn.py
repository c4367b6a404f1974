"""A later turn of `generate`: of the conversation's images, those that the cache does not hold enter."""

import pytest
import torch
from transformers import PreTrainedModel

from checkpoints import QWEN_TYPES
from patching import batch, image, open_gates, patched_pair
from surgeon.memory.visual_memory import VisualMemory

GRID = (1, 4, 6)
TEXT = [5, 6, 7]


@pytest.fixture(scope="module", params=QWEN_TYPES)
def patched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    model = patched_pair(tmp_path_factory.mktemp(request.param), request.param)[1]
    open_gates(model)
    return model


@pytest.mark.parametrize("cached", [len(TEXT), len(TEXT) + 1], ids=["before its start token", "at its first token"])
@torch.no_grad()
def test_an_image_right_behind_the_cache_is_new(patched: PreTrainedModel, cached: int) -> None:
    """A cache that ends with the text before an image, or with the token that starts it."""
    conversation = batch(patched, [[*TEXT, *image(GRID), 8, 9]], [GRID])
    ids = conversation["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cache = patched(input_ids=ids[:, :cached], use_cache=True).past_key_values
    later = patched.generate(**conversation, past_key_values=cache, **options)
    memory = VisualMemory.of(later.past_key_values, 4)
    assert memory.mask is not None and memory.mask.sum().item() == 6

    # by hand: the image and what follows it, behind the cached text
    positions = patched._prepare_position_ids_for_generation(ids, dict(conversation))
    new = {name: conversation[name][:, cached:] for name in ("input_ids", "mm_token_type_ids")}
    pixels = {name: conversation[name] for name in ("pixel_values", "image_grid_thw")}
    cache = patched(input_ids=ids[:, :cached], use_cache=True).past_key_values
    logits = patched(**new, **pixels, position_ids=positions[..., cached:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(later.logits[0], logits, atol=1e-5, rtol=0)
