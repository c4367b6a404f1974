"""Image files as transformers reads them. What is refused is tested with the prompts that name it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from surgeon.errors import InputError
from surgeon.images import load_image

EXIF_ORIENTATION = 0x0112


def noise(width, height):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "L", "LA", "I;16", "1"])
def test_image_files_of_any_mode_become_rgb(tmp_path, mode):
    image = noise(40, 30)
    image = Image.new("I;16", (40, 30), 30000) if mode == "I;16" else image.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB" and loaded.size == (40, 30)
    np.testing.assert_array_equal(np.array(loaded), np.array(Image.open(path).convert("RGB")))


def test_image_files_are_turned_upright(tmp_path):
    image = noise(40, 30)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # to be turned clockwise
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.array(load_image(tmp_path / "a.png")), np.rot90(np.array(image), -1))


def test_photographs_with_a_preview_frame_are_images(tmp_path):
    noise(40, 30).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[noise(20, 10)])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.n_frames == 2
    assert load_image(tmp_path / "a.jpg").size == (40, 30)


def test_two_frames_are_a_video(tmp_path):
    noise(8, 8).save(tmp_path / "a.gif", save_all=True, append_images=[noise(8, 9).resize((8, 8))])
    with pytest.raises(InputError, match=r"a\.gif has 2 frames: video is not supported"):
        load_image(tmp_path / "a.gif")
    noise(8, 8).save(tmp_path / "still.gif")
    assert load_image(tmp_path / "still.gif").size == (8, 8)


@pytest.mark.parametrize("address", ["https://example.org/a.png", "http:/example.org/a.png", "data:image/png,AA"])
def test_addresses_are_not_fetched(address):
    with pytest.raises(InputError, match="is an address, and images are read from files"):
        load_image(address)
    with pytest.raises(InputError, match="is an address"):
        load_image(Path(address))
