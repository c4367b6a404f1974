"""An image from outside, read or refused."""

import re
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from surgeon.errors import InputError
from surgeon.video import is_video

ImageSource = Image.Image | Path | str
# photographs with a second frame (a depth map, a preview), not animations
STILL_FORMATS = ("MPO",)


def load_image(source: ImageSource) -> Image.Image:
    """An image as transformers reads it: a file turned upright and made RGB, an image object as it is (the image
    processor makes it RGB). Raises InputError for what is missing, damaged, animated, too large or a video."""
    if isinstance(source, Image.Image):
        _refuse_animation(source, "the image")
        _refuse_large(source, "the image")
        return source
    path = Path(source)
    if re.match(r"(?i)(https?|ftp|s3|gs|data):", str(source)):
        raise InputError(f"{source} is an address, and images are read from files: download it, and name the file")
    try:
        if is_video(path):
            raise InputError(f"{path} is a video: video is not supported yet, pass images")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _refuse_large reports it
            with Image.open(path) as image:
                _refuse_large(image, str(path))
                _refuse_animation(image, str(path))
                # an image inside another's frame (an icon) says its size only now
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that Pillow can read: pass a PNG, JPEG, WebP or the like") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"image {path} is too large: {error}; scale it down first") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow reports damage as any of these
        raise InputError(f"image {path} cannot be read: {error}") from None


def _refuse_large(image: Image.Image, name: str) -> None:
    """By what the file says of itself; no pixel is read for it."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise InputError(
            f"{name} is too large: {image.width} x {image.height} pixels, and {most / 1e6:.0f} million are read; scale "
            "it down first"
        )


def _refuse_animation(image: Image.Image, name: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in STILL_FORMATS:
        raise InputError(f"{name} has {frames} frames: video is not supported yet, pass one frame as an image")
