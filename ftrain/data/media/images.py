"""Pictures by Pillow: upright, three colours, on white where they are transparent."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

try:
    from PIL import Image, ImageOps
except ImportError as absent:
    raise ValueError('pictures need Pillow: pip install "ftrain-omni[media]"') from absent

from ftrain.data.media.limits import Limits
from ftrain.data.media.opening import media_bytes, media_file, name_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_DEEP = ("PNG", "PPM")  # in which Pillow's mode "I" is of 16 bits
_WHITE = (255, 255, 255, 255)
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF's


def image_size(source: Any, place: Place, limits: Limits) -> tuple[int, int]:
    """Height and width that `read_image` will give, from the header alone. BadRow as there, where the header tells."""
    if isinstance(source, np.ndarray):
        return _checked(source, place, limits).shape[:2]
    if isinstance(source, Image.Image):
        return _upright_size(source)
    with _refused(source, place), media_file(source, place, limits) as file:
        image = Image.open(file, formats=_FORMATS)
        limits.check("pixels", image.width * image.height, place, name_of(source))
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    # to ask a PNG for EXIF data that its header has not is to decode it
    told = image.info.get("exif") if image.format == "PNG" else True
    turned = told and image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    return (image.width, image.height) if turned else (image.height, image.width)


def read_image(source: Any, place: Place, limits: Limits) -> np.ndarray:
    """A picture as uint8 `[height, width, 3]`, turned as its EXIF data say; of an animation the first frame.

    `source`: a path, the bytes of a file, a picture of Pillow, or such an array. BadRow where it is too large (which is
    seen before it is decoded), broken, or of an unknown format.
    """
    if isinstance(source, np.ndarray):
        return _checked(source, place, limits)
    with _refused(source, place):
        image = source if isinstance(source, Image.Image) else _opened(source, place, limits)
        limits.check("pixels", image.width * image.height, place, name_of(source))
        upright = ImageOps.exif_transpose(image)
        return np.asarray(_rgb(_of_eight_bits(upright, image.format, source, place)), np.uint8)


@contextmanager
def _refused(source: Any, place: Place) -> Iterator[None]:
    """BadRow for what Pillow refuses within the block."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRow(place, "media too large", f"{name_of(source)} is too large a picture: {error}") from error
    except (OSError, SyntaxError, EOFError, struct.error, ValueError, OverflowError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(place, "broken media", f"{name_of(source)} is no whole picture: {error}") from error


def _opened(source: Any, place: Place, limits: Limits) -> Image.Image:
    return Image.open(io.BytesIO(media_bytes(source, place, limits)), formats=_FORMATS)


def _of_eight_bits(image: Image.Image, format: str | None, source: Any, place: Place) -> Image.Image:
    """A picture of one deep channel with 8 bits, others as they are. BadRow where nothing says what is white."""
    if image.mode == "F" or (image.mode == "I" and format not in _DEEP):
        kind = "with a point" if image.mode == "F" else "of 32 bits"
        detail = f"{name_of(source)} has numbers {kind}, of which none is said to be white: save it with 8 or 16 bits"
        raise BadRow(place, "broken media", detail)
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image, np.float64) * (255.0 / 65535.0)).astype(np.uint8))


def _rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or "transparency" in image.info:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, _WHITE), above).convert("RGB")
    return image.convert("RGB")


def _checked(array: np.ndarray, place: Place, limits: Limits) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise BadRow(place, "broken media", f"a picture of {array.dtype} {array.shape}, not uint8 [height, width, 3]")
    limits.check("pixels", array.shape[0] * array.shape[1], place, "an array")
    return array


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture uint8 `[h, w, 3]` in another size: uint8 `[height, width, 3]`, bicubic, smoothed when it shrinks."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
