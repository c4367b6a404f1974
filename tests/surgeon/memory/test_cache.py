"""What is done to a request's cache is done to its visual memory: cropping, resetting, copying."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from checkpoints import tiny_model
from patching import apply, batch, image, randomise_grafts
from surgeon import models
from surgeon.memory.visual_memory import VisualMemory

FIRST, SECOND = (1, 4, 6), (1, 8, 4)
TURN = [5, 6, *image(FIRST), 7, 8]
ROW = [*TURN, 9, 10, *image(SECOND), 11]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    directory = tmp_path_factory.mktemp("cropped")
    tiny_model("qwen3_vl").save_pretrained(directory / "a")
    apply(directory / "a", directory / "b", "pvm:layers=1,3,latent=32", "mixin:layers=2")
    model = models.load(directory / "b")
    randomise_grafts(model)
    return model


def positions_of(model: PreTrainedModel, kwargs: dict[str, Tensor]) -> Tensor:
    return model._prepare_position_ids_for_generation(kwargs["input_ids"], dict(kwargs))


@torch.no_grad()
def continued(model: PreTrainedModel, cache: Any, first_position: int) -> Tensor:
    """Logits of three words that follow what is in the cache."""
    positions = (first_position + torch.arange(3)).expand(4, 1, 3)
    ids = torch.tensor([[20, 21, 22]])
    return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
def filled(model: PreTrainedModel, row: list[int], grids: list[Any], cache: Any = None) -> tuple[Any, int]:
    """A cache with this row in it, and the position that follows."""
    kwargs = batch(model, [row], grids)
    positions = positions_of(model, kwargs)
    cache = DynamicCache(config=model.config.text_config) if cache is None else cache
    model(**kwargs, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache, int(positions.max()) + 1


@pytest.mark.parametrize("kept", [2, 1])
def test_a_cropped_image_is_forgotten(model: PreTrainedModel, kept: int) -> None:
    """The cache as if it had never been fed: words, and both images or the first behind them."""
    cropped, _ = filled(model, ROW, [FIRST, SECOND])
    length = len(TURN) if kept == 1 else len(ROW) - 1
    cropped.crop(length - len(ROW))
    pixels = batch(model, [ROW], [FIRST, SECOND])["pixel_values"]
    alone = DynamicCache(config=model.config.text_config)
    kwargs = batch(model, [ROW[:length]], [FIRST, SECOND][:kept])
    kwargs["pixel_values"] = pixels[: len(kwargs["pixel_values"])]
    positions = positions_of(model, kwargs)
    with torch.no_grad():
        model(**kwargs, position_ids=positions, past_key_values=alone, use_cache=True)
    following = int(positions.max()) + 1
    torch.testing.assert_close(
        continued(model, cropped, following), continued(model, alone, following), atol=1e-5, rtol=1e-5
    )


def test_cropped_before_every_image_it_is_the_words(model: PreTrainedModel) -> None:
    cropped, _ = filled(model, TURN, [FIRST])
    cropped.crop(2 - len(TURN))
    memory = VisualMemory.of(cropped, 4)
    assert memory.mask is None and not memory.entries
    words, following = filled(model, TURN[:2], [])
    assert torch.allclose(continued(model, cropped, following), continued(model, words, following), atol=1e-5)


def test_cropped_in_the_middle_of_an_image(model: PreTrainedModel) -> None:
    cache, _ = filled(model, TURN, [FIRST])
    cache.crop(6 - len(TURN))  # two words, a marker, three of its six tokens
    mask = VisualMemory.of(cache, 4).mask
    assert mask is not None and mask.sum() == 3


def test_cropped_again_without_a_call_between(model: PreTrainedModel) -> None:
    """Each crop counts from where the last one ended."""
    cache, _ = filled(model, TURN, [FIRST])
    for _ in range(len(TURN) - 6):
        cache.crop(-1)
    mask = VisualMemory.of(cache, 4).mask
    assert cache.get_seq_length() == 6 and mask is not None and mask.sum() == 3


def test_an_image_that_comes_after_a_crop_stands_where_the_old_one_did(model: PreTrainedModel) -> None:
    cropped, _ = filled(model, TURN, [FIRST])
    cropped.crop(2 - len(TURN))
    row = [*image(SECOND), 7, 8]
    whole = batch(model, [[*TURN[:2], *row]], [SECOND])
    positions = positions_of(model, whole)
    later = {name: whole[name][:, 2:] for name in ("input_ids", "mm_token_type_ids")}
    pixels = {name: whole[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        expected = model(**whole, position_ids=positions, use_cache=False).logits[:, 2:]
        logits = model(**later, **pixels, position_ids=positions[..., 2:], past_key_values=cropped).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_crop_of_a_batch_is_each_rows(model: PreTrainedModel) -> None:
    """Padded on the left, an image stands at another column in each row."""
    rows, grids = [TURN, [*TURN[2:10], 9]], [FIRST, FIRST]
    kwargs = batch(model, rows, grids)
    with torch.no_grad():
        cache = model(**kwargs, use_cache=True).past_key_values
    cache.crop(-5)  # of the first row the last two words, a marker and two of six tokens; one more of the second
    mask = VisualMemory.of(cache, 4).mask
    assert mask is not None and mask.sum(1).tolist() == [4, 3]


def test_a_reset_cache_serves_the_next_request(model: PreTrainedModel) -> None:
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    filled(model, ROW, [FIRST, SECOND], cache)
    cache.reset()
    _, following = filled(model, TURN[:2], [], cache)
    words, _ = filled(model, TURN[:2], [])
    assert torch.allclose(continued(model, cache, following), continued(model, words, following), atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_goes_its_own_way(model: PreTrainedModel, copied: Any) -> None:
    cache, following = filled(model, TURN, [FIRST])
    other = copied(cache)
    other.crop(2 - len(TURN))
    expected = continued(model, filled(model, TURN, [FIRST])[0], following)
    assert torch.equal(continued(model, cache, following), expected)
    assert not torch.allclose(continued(model, other, 2), expected, atol=1e-2)


class TestCompressedPositions:
    """RoPE-DHR: the ids of a request do not follow from its length, so a crop has to know which ids it takes away."""

    @pytest.fixture
    def memory(self) -> VisualMemory:
        """Two rows, the second padded on the left by two: a prompt with an image whose ids jump back, two words one by
        one, a later turn of three, a word."""
        memory = VisualMemory()
        prompt = torch.tensor([[0, 1, 2, 3, 4, 3, 5], [0, 0, 0, 1, 2, 1, 3]])
        steps = [prompt, *(prompt.max(1).values[:, None] + i for i in (1, 2))]
        steps.append(steps[-1] + torch.tensor([[1, 2, 3]]))
        steps.append(steps[-1][:, -1:] + 1)
        self.fed = torch.cat(steps, 1)
        for ids in steps:
            memory.continue_positions(ids, memory.length)
            memory.length += ids.shape[1]
        return memory

    @pytest.mark.parametrize("removed", range(13))
    def test_the_next_id_follows_the_largest_that_is_left(self, memory: VisualMemory, removed: int) -> None:
        memory.crop(-removed)
        left = self.fed[:, : self.fed.shape[1] - removed]
        expected = [int(row.max()) + 1 for row in left]
        assert memory.next_position is not None and memory.next_position.tolist() == expected

    def test_cropped_twice_and_continued(self, memory: VisualMemory) -> None:
        memory.crop(-4)
        memory.crop(-3)
        memory.continue_positions(torch.tensor([[6, 7], [4, 5]]), memory.length)
        memory.length += 2
        memory.crop(-1)
        assert memory.next_position is not None and memory.next_position.tolist() == [7, 5]

    def test_nothing_is_left(self, memory: VisualMemory) -> None:
        memory.crop(-self.fed.shape[1])
        assert memory.next_position is None and memory.following_positions(1) is None

    def test_rows_keep_their_ids(self, memory: VisualMemory) -> None:
        memory.batch_select_indices(torch.tensor([1, 1, 0]))
        memory.crop(-6)
        assert memory.next_position is not None and memory.next_position.tolist() == [4, 4, 6]

    def test_rows_keep_their_next_id_without_a_crop(self, memory: VisualMemory) -> None:
        memory.batch_select_indices(torch.tensor([1, 1, 0]))
        following = memory.following_positions(2)
        assert following is not None and following.tolist() == [[10, 11], [10, 11], [12, 13]]

    def test_a_call_may_end_in_an_image_whose_last_id_is_not_the_largest(self) -> None:
        memory = VisualMemory()
        memory.continue_positions(torch.tensor([[0, 1, 2, 5, 3]]), 0)
        assert memory.next_position is not None and memory.next_position.tolist() == [6]

    def test_a_reset_memory_counts_from_the_cache_again(self, memory: VisualMemory) -> None:
        memory.reset()
        assert memory.following_positions(1) is None
        memory.continue_positions(torch.tensor([[0, 1, 2]]), memory.length)
        memory.length += 3
        memory.crop(-1)
        assert memory.next_position is not None and memory.next_position.tolist() == [2]


@pytest.mark.parametrize("what", ["rebuilt", "cut"])
def test_a_cache_that_lost_its_memory_is_refused(model: PreTrainedModel, what: str) -> None:
    """Whoever copies or cuts keys and values layer by layer leaves the images behind, or some that are gone."""
    cache, position = filled(model, TURN, [FIRST])
    if what == "rebuilt":
        cache = DynamicCache([(layer.keys, layer.values) for layer in cache.layers[:-1]])
    else:
        for layer in cache.layers[:-1]:
            layer.keys, layer.values = layer.keys[:, :, :4], layer.values[:, :, :4]
    with pytest.raises(ValueError, match="copied or cut without its memory"):
        continued(model, cache, position)
