"""Profiles: what was asked for, in the graphs' own dimensions, or a refusal with the numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import CASES, Case
from exporters.onnx.manifest import Manifest, Port
from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.profiles import LOGITS, Limits, Profile, Range, make_profiles, split_dimension
from pairs import Pair

QWEN3, QWEN25, INTERNVL, _, LLAVA = CASES
BundleOf = Callable[[Case], Pair]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1..4096", (1, 1024, 4096)),
        ("1..512..4096", (1, 512, 4096)),
        ("8", (8, 8, 8)),
        ("2048..4096", (2048, 2048, 4096)),
        ("1..16", (1, 16, 16)),
    ],
)
def test_ranges(text: str, expected: tuple[int, int, int]) -> None:
    parsed = Range.parse(text, "--x")
    assert (parsed.min, parsed.opt, parsed.max) == expected
    assert str(parsed) == text


@pytest.mark.parametrize("text", ["", "..", "4..1", "0..4", "1..2..3..4", "a..b", "-1..4", "1.5", "1..", "¹..²"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(EngineError, match="--batch"):
        Range.parse(text, "--batch")


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=2).map(sorted))
def test_a_range_of_two_numbers_holds_both(numbers: list[int]) -> None:
    parsed = Range.parse(f"{numbers[0]}..{numbers[1]}", "--x")
    assert parsed.min == numbers[0] <= parsed.opt <= parsed.max == numbers[1]


def test_shapes_of_multiples() -> None:
    ports = [Port(name="x", dtype="float16", shape=["4*M", 8]), Port(name="y", dtype="float16", shape=[3, 8])]
    profile = Profile(name="any", sizes={"M": Range(min=1, opt=5, max=9)})
    assert profile.shapes(ports) == {"x": ([4, 8], [20, 8], [36, 8])}
    assert split_dimension("M") == (1, "M")
    with pytest.raises(EngineError, match=r"'M \+ 1', which no profile is known for"):
        split_dimension("M + 1")


def profiles(bundle_of: BundleOf, case: Case, **limits: str) -> dict[str, list[Profile]]:
    bundle = bundle_of(case).bundle
    texts = [limits.get(name) for name in ("prefill", "batch", "image_tokens", "visual_tokens")]
    return make_profiles(bundle, Manifest.load(bundle), Limits.parse(texts[0], texts[1] or "1", texts[2], texts[3]))


def test_the_decoder_has_one_for_decoding_and_one_for_prefill(bundle_of: BundleOf) -> None:
    by_graph = profiles(bundle_of, QWEN3, prefill="1..128", batch="1..8", visual_tokens="1..200")
    decode, prefill = by_graph["decoder"]
    assert (decode.name, prefill.name) == ("decode", "prefill")
    assert {name: str(size) for name, size in decode.sizes.items()} == {
        "B": "1..1..8",
        "S": "1",
        "T": "1",
        "M": "1..200",
    }
    assert str(prefill.sizes["S"]) == "1..128" and prefill.sizes["T"] == Range(min=1, opt=1, max=LOGITS)
    assert by_graph["memory"][0].sizes["M"] == decode.sizes["M"]
    assert by_graph["embed"][0].sizes["S"].max == 128


def test_a_mask_of_each_token_is_as_long_as_they_are(bundle_of: BundleOf) -> None:
    by_graph = profiles(bundle_of, QWEN3, prefill="1..128", batch="1..8", visual_tokens="1..200")
    inputs = Manifest.load(bundle_of(QWEN3).bundle).graphs["decoder"].inputs
    (mask,) = [port for port in inputs if port.name == "memory_mask"]
    decode, prefill = (profile.shapes([mask])["memory_mask"] for profile in by_graph["decoder"])
    assert QWEN3.visibility == "causal"
    assert decode == ([1, 1, 1], [1, 1, 200], [8, 1, 200])
    assert prefill == ([1, 1, 1], [1, 128, 200], [8, 128, 200])


def test_images_of_patches_windows_and_tiles(bundle_of: BundleOf) -> None:
    (qwen3,) = profiles(bundle_of, QWEN3, image_tokens="4..100")["vision"]
    assert qwen3.sizes == {"M": Range(min=4, opt=100, max=100)}
    (qwen25,) = profiles(bundle_of, QWEN25, image_tokens="4..100")["vision"]
    # windows of 4 x 4 tokens: one for 4 tokens, 25 for an image of 1 x 100
    assert (qwen25.sizes["W"].min, qwen25.sizes["W"].max) == (1, 25)
    (tiles,) = profiles(bundle_of, INTERNVL, image_tokens="9..63")["vision"]
    assert tiles.sizes == {"T": Range(min=1, opt=7, max=7)}, "9 tokens a tile"
    (both,) = profiles(bundle_of, LLAVA)["vision"]
    assert set(both.sizes) == {"T", "M"} and both.sizes["T"].max == 10, "3 x 3 tiles and the whole"


@pytest.mark.parametrize(
    ("limits", "visual"),
    [
        ({}, "1..256"),
        ({"prefill": "1..64"}, "1..64"),
        ({"prefill": "1..64", "image_tokens": "4..100"}, "1..100"),
        ({"prefill": "1..64", "image_tokens": "4..100", "visual_tokens": "1..300"}, "1..300"),
    ],
)
def test_by_default_the_memory_holds_a_prefill_and_any_one_image(
    bundle_of: BundleOf, limits: dict[str, str], visual: str
) -> None:
    """An image may come in several prefills, so it may have more tokens than one of them."""
    by_graph = profiles(bundle_of, QWEN3, **limits)
    expected = Range.parse(visual, "--visual-tokens")
    assert {profile.sizes["M"] for profile in (*by_graph["memory"], *by_graph["decoder"])} == {expected}


def test_by_default_tiles_are_those_that_the_processor_cuts(bundle_of: BundleOf) -> None:
    settings = json.loads((bundle_of(INTERNVL).bundle / "processor" / "preprocessor_config.json").read_text())
    (vision,) = profiles(bundle_of, INTERNVL)["vision"]
    assert vision.sizes["T"].max == settings["max_patches"] + 1


def test_tiles_of_an_image_processor_within_the_processors_file(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundle_of(INTERNVL).bundle, tmp_path / "bundle"))
    settings = json.loads((bundle / "processor" / "preprocessor_config.json").read_text())
    nested = {"image_processor": settings | {"max_patches": 20}}
    (bundle / "processor" / "processor_config.json").write_text(json.dumps(nested))
    assert make_profiles(bundle, Manifest.load(bundle), Limits())["vision"][0].sizes["T"].max == 21


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"prefill": "1..257"}, r"--prefill 1..257: the bundle's caches hold 256 tokens.* --max-length 257"),
        ({"image_tokens": "4..300"}, r"--image-tokens 4..300: .* hold 256 tokens.* --max-length 300"),
        ({"visual_tokens": "1..32"}, r"--visual-tokens 1..32: one image has up to 256 visual tokens"),
        ({"visual_tokens": "2..256"}, r"--visual-tokens 2..256: a row without images has one slot"),
        ({"batch": "1..1000000"}, r"embed: .* elements, TensorRT takes 2,147,483,647; lower --batch or --prefill, or"),
        ({"batch": "1..40000"}, r"decoder: memory_mask would have up to \[40000, 256, 256\] .*, --visual-tokens, or"),
    ],
)
def test_limits_that_do_not_fit(bundle_of: BundleOf, limits: dict[str, str], expected: str) -> None:
    with pytest.raises(EngineError, match=expected) as raised:
        profiles(bundle_of, QWEN3, **limits)
    assert "\n" not in str(raised.value)


def test_tiles_that_go_to_the_memory_alone_need_no_room_in_the_caches(bundle_of: BundleOf) -> None:
    bundle = bundle_of(INTERNVL).bundle
    manifest, limits = Manifest.load(bundle), Limits(image_tokens=Range.of(9, 270))
    with pytest.raises(EngineError, match=r"--image-tokens 9..270: .* hold 256 tokens"):
        make_profiles(bundle, manifest, limits)
    of_memory = make_profiles(bundle, manifest.model_copy(update={"allocation": "memory"}), limits)
    assert of_memory["vision"][0].sizes["T"].max == 30 and of_memory["memory"][0].sizes["M"].max == 270


def test_a_tile_is_the_least(bundle_of: BundleOf) -> None:
    with pytest.raises(EngineError, match="one tile of this model has 9 tokens already"):
        profiles(bundle_of, INTERNVL, image_tokens="1..8")


@pytest.mark.parametrize(("tokens", "tile_count"), [(1, 1), (9, 1), (10, 2), (18, 2)])
def test_the_fewest_tiles_have_the_fewest_tokens(bundle_of: BundleOf, tokens: int, tile_count: int) -> None:
    """No image is without a tile, and a tile has 9 tokens."""
    (vision,) = profiles(bundle_of, INTERNVL, image_tokens=f"{tokens}..63")["vision"]
    assert vision.sizes["T"].min == tile_count


def test_a_dimension_of_another_version(bundle_of: BundleOf, tmp_path: Path) -> None:
    manifest = Manifest.load(bundle_of(QWEN3).bundle)
    content: Any = json.loads(manifest.model_dump_json())
    content["graphs"]["decoder"]["inputs"][0]["shape"][0] = "Z"
    with pytest.raises(EngineError, match=r"decoder.onnx has a dimension 'Z'.*update surgeon"):
        make_profiles(tmp_path, Manifest.model_validate(content), Limits())


def test_by_default_the_memory_takes_every_tile_whatever_a_prefill_holds(bundle_of: BundleOf) -> None:
    bundle = bundle_of(INTERNVL).bundle
    settings = json.loads((bundle / "processor" / "preprocessor_config.json").read_text())
    manifest, limits = Manifest.load(bundle), Limits(prefill=Range.of(1, 18))
    most = {
        allocation: make_profiles(bundle, manifest.model_copy(update={"allocation": allocation}), limits)
        for allocation in ("both", "memory")
    }
    tiles = {allocation: by_graph["vision"][0].sizes["T"].max for allocation, by_graph in most.items()}
    assert tiles == {"both": 2, "memory": settings["max_patches"] + 1}, "9 tokens a tile"
