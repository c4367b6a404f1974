"""Videos that a caller hands to a patched model: it takes them as its base does, and they enter the memory."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from checkpoints import TOKEN_IDS
from patching import IMAGE, image, open_gates, patched_pair
from surgeon.memory.visual_memory import VisualMemory

VIDEO, START, END = (TOKEN_IDS[name] for name in ("video_token_id", "vision_start_token_id", "vision_end_token_id"))
GRID, OTHER, ONE_FRAME = (3, 4, 6), (2, 4, 4), (1, 4, 10)
PAIR = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "llava_onevision"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PAIR:
    """Source and patched, gates closed."""
    return patched_pair(tmp_path_factory.mktemp(request.param), request.param)


def video(model: PreTrainedModel, grid: tuple[int, int, int]) -> list[int]:
    """A video's tokens: Qwen3-VL has each frame apart, behind its time."""
    frames, tokens = grid[0], grid[1] * grid[2] // 4
    if model.config.model_type.endswith("llava_onevision"):
        return [VIDEO] * (9 * frames + 1)  # pooled to 3 x 3 a frame, and a newline
    if model.config.model_type.endswith("qwen2_5_vl"):
        return [START, *[VIDEO] * (frames * tokens), END]
    return [token for frame in range(frames) for token in (30 + frame, START, *[VIDEO] * tokens, END)]


def pixels(model: PreTrainedModel, *grids: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    if model.config.model_type.endswith("llava_onevision"):
        return torch.randn(len(grids), grids[0][0], 3, 42, 42, generator=generator)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return torch.randn(sum(t * h * w for t, h, w in grids), width, generator=generator)


def padded_kwargs(model: PreTrainedModel, ids: list[list[int]], **images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Model keywords for rows padded left, of which those without a grid are left out where a family has none."""
    length = max(map(len, ids))
    input_ids = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
    kwargs = {"input_ids": input_ids, "attention_mask": mask, **images}
    if model.config.model_type.endswith("llava_onevision"):
        return {name: value for name, value in kwargs.items() if not name.endswith("_thw")}
    return {**kwargs, "mm_token_type_ids": (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long()}


def one_video(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    row = [5, 6, *video(model, GRID), 7, 8]
    return padded_kwargs(model, [row], pixel_values_videos=pixels(model, GRID), video_grid_thw=torch.tensor([GRID]))


@torch.no_grad()
def test_identity_at_insertion(pair: PAIR) -> None:
    source, patched = pair
    open_gates(patched, 0.0)
    kwargs = one_video(source)
    assert torch.equal(source(**kwargs).logits, patched(**kwargs).logits)
    answers = [model.generate(**kwargs, max_new_tokens=6, do_sample=False) for model in pair]
    assert torch.equal(*answers)


@torch.no_grad()
def test_a_cache_holds_what_recomputing_gives(pair: PAIR) -> None:
    source, patched = pair
    open_gates(patched)
    kwargs = one_video(patched)
    assert (source(**kwargs).logits - patched(**kwargs).logits).abs().max() > 0.1
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    generated = patched.generate(**kwargs, **options)
    memory = VisualMemory.of(generated.past_key_values, 4)
    assert memory.mask is not None and memory.mask.sum() == (kwargs["input_ids"] == VIDEO).sum()
    row = kwargs["input_ids"][0].tolist()
    for step in generated.logits:
        again = padded_kwargs(patched, [row])
        logits = patched(**{**kwargs, **again}, use_cache=False).logits[:, -1]
        torch.testing.assert_close(step, logits, atol=2e-5, rtol=0)
        row.append(int(logits.argmax()))


@torch.no_grad()
def test_rows_with_videos_and_images_are_as_each_alone(pair: PAIR) -> None:
    _, patched = pair
    if patched.config.model_type.endswith("llava_onevision"):
        pytest.skip("its videos of one batch have as many frames each")
    open_gates(patched)
    videos, images = pixels(patched, GRID, OTHER), pixels(patched, ONE_FRAME, seed=1)
    frames = pixels(patched, GRID).shape[0]
    rows = [[5, *video(patched, GRID), 7], [4, *image(ONE_FRAME), *video(patched, OTHER), 9], [3, 4]]
    both = {"pixel_values": images, "image_grid_thw": torch.tensor([ONE_FRAME])}
    alone = [
        {"pixel_values_videos": videos[:frames], "video_grid_thw": torch.tensor([GRID])},
        {"pixel_values_videos": videos[frames:], "video_grid_thw": torch.tensor([OTHER]), **both},
        {},
    ]
    together = {"pixel_values_videos": videos, "video_grid_thw": torch.tensor([GRID, OTHER]), **both}
    logits = patched(**padded_kwargs(patched, rows, **together)).logits
    for row, (ids, own) in enumerate(zip(rows, alone, strict=True)):
        expected = patched(**padded_kwargs(patched, [ids], **own)).logits[0]
        torch.testing.assert_close(logits[row, -len(ids) :], expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_later_turn_with_a_video_is_refused(pair: PAIR) -> None:
    _, patched = pair
    kwargs = one_video(patched)
    cache = patched(**kwargs, use_cache=True).past_key_values
    longer = {**kwargs, **padded_kwargs(patched, [[*kwargs["input_ids"][0].tolist(), 9]])}
    with pytest.raises(ValueError, match="a later turn with a video is not supported; pass no past_key_values"):
        patched.generate(**longer, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("model_type", ["internvl", "ovis2"])
def test_a_family_without_videos_says_so(model_type: str, tmp_path: Path) -> None:
    patched = patched_pair(tmp_path, model_type)[1]
    ids = torch.tensor([[5, *[IMAGE] * 9, 6]])
    with pytest.raises(ValueError, match="takes no pixel_values_videos"):
        patched(input_ids=ids, pixel_values_videos=torch.zeros(1, 1, 3, 42, 42))
