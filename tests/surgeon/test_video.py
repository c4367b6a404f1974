"""Which files are videos; images of the formats that Pillow writes are none."""

import io
from pathlib import Path

import pytest
from PIL import Image, features

from surgeon.errors import InputError
from surgeon.images import load_image
from surgeon.video import is_video

BEGINNINGS = {
    "MP4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41",
    "QuickTime": b"\0\0\0\x14ftypqt  \0\0\2\0qt  ",
    "old QuickTime": b"\0\0\0\x20moov\0\0\0\x18mvhd",
    "Matroska": bytes.fromhex("1a45dfa3a3428681014286"),
    "AVI": b"RIFF\x24\0\0\0AVI LIST",
    "MPEG": b"\0\0\x01\xba\x44\0\x04\0\x04",
    "MPEG video": b"\0\0\x01\xb3\x14\0\xf0\x13",
    "transport stream": (b"G" + b"\0" * 187) * 3,
    "FLV": b"FLV\x01\x05\0\0\0\x09",
    "WMV": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_video_without_a_name_is_told_as_one(name: str, tmp_path: Path) -> None:
    """A server writes what it is sent to a file whose name says nothing."""
    path = tmp_path / "image-0"
    path.write_bytes(BEGINNINGS[name] + b"\0" * 64)
    assert is_video(path)
    with pytest.raises(InputError, match="image-0 is a video: video is not supported yet, pass images"):
        load_image(path)


def test_a_name_is_enough(tmp_path: Path) -> None:
    assert is_video(tmp_path / "film.MP4") and is_video(tmp_path / "film.webm")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF"])
def test_images_are_no_videos(kind: str, tmp_path: Path) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 30, 30)).save(file, kind)
    path = tmp_path / "image-0"
    path.write_bytes(file.getvalue())
    assert not is_video(path) and load_image(path).size == (20, 10)


@pytest.mark.parametrize("content", [b"", b"G", b"no image", b"G" * 100])
def test_what_is_neither_is_no_video(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "image-0").write_bytes(content)
    assert not is_video(tmp_path / "image-0")
    with pytest.raises(InputError, match="is not an image"):
        load_image(tmp_path / "image-0")
