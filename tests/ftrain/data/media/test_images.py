import base64
import io
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from ftrain.data.media.images import read_image, resized
from ftrain.data.media.limits import Limits
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place

PLACE = Place("rows/chat.jsonl", 4)
LIMITS = Limits()


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(height=6, width=9):
    values = np.arange(height * width * 3) % 256
    return values.reshape(height, width, 3).astype(np.uint8)


def test_a_picture_is_the_same_from_bytes_a_path_a_data_url_and_an_array(tmp_path):
    array = gradient()
    raw = encoded(Image.fromarray(array))
    (tmp_path / "a.png").write_bytes(raw)
    url = "data:image/png;base64," + base64.b64encode(raw).decode()
    place = Place(str(tmp_path / "chat.jsonl"), 1)
    for source in (raw, str(tmp_path / "a.png"), "a.png", url, array, Image.fromarray(array)):
        assert (read_image(source, place, LIMITS) == array).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_upright(orientation):
    image = Image.fromarray(gradient())
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes the one that EXIF tells
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image if orientation == 1 else image.transpose(Image.Transpose(turned[orientation]))
    assert (read_image(encoded(stored, exif=exif), PLACE, LIMITS) == gradient()).all()


def test_what_is_transparent_is_white_in_every_mode():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert (read_image(encoded(clear), PLACE, LIMITS) == 255).all()
    assert (read_image(encoded(half), PLACE, LIMITS) == 127).all()
    assert (read_image(encoded(Image.new("LA", (2, 2), (9, 0))), PLACE, LIMITS) == 255).all()
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert read_image(encoded(palette), PLACE, LIMITS)[0, 0].tolist() == [10, 20, 30]
    assert (read_image(encoded(palette, transparency=1), PLACE, LIMITS) == 255).all()


def test_grey_cmyk_and_sixteen_bits():
    deep = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    for kind in ("PNG", "TIFF", "PPM"):
        assert (read_image(encoded(deep, kind), PLACE, LIMITS) == 127).all()
    dark = Image.fromarray(np.full((2, 2), 200, np.uint16))
    assert (read_image(encoded(dark), PLACE, LIMITS) == 0).all()
    assert (read_image(encoded(Image.new("L", (2, 2), 7)), PLACE, LIMITS) == 7).all()
    assert read_image(encoded(Image.new("CMYK", (2, 2)), "JPEG"), PLACE, LIMITS).shape == (2, 2, 3)


def bomb(width, height):
    """A PNG file of some bytes whose header tells of a huge picture."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(9000, 9000), (12_000, 12_000), (60_000, 60_000)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(size):
    with pytest.raises(BadRow, match=r"chat\.jsonl, row 4") as error:
        read_image(bomb(*size), PLACE, LIMITS)
    assert error.value.kind == "media too large"


def test_files_are_not_read_past_their_limit(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x" * 2000)
    with pytest.raises(BadRow, match="2000 file bytes, more than 1000"):
        read_image(str(tmp_path / "a.png"), PLACE, Limits(file_bytes=1000))
    with pytest.raises(BadRow, match="file bytes"):
        read_image(b"x" * 2000, PLACE, Limits(file_bytes=1000))


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("none.png", "media missing"),
        ("https://example.org/a.png", "media on the web"),
        ("data:image/png;base64,???", "broken media"),
        (b"", "broken media"),
        (b"no picture", "broken media"),
        (encoded(Image.fromarray(gradient(99, 99)))[:200], "broken media"),
        (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "broken media"),
        (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "broken media"),
        (encoded(Image.fromarray(np.full((4, 4), 200, np.int32)), "TIFF"), "broken media"),
        (None, "media missing"),
        (3, "media missing"),
        ("", "media missing"),
        (np.zeros((4, 4)), "broken media"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "broken media"),
    ],
)
def test_what_is_no_picture_is_a_named_reject(source, kind):
    with pytest.raises(BadRow, match=r"rows/chat\.jsonl, row 4: ") as error:
        read_image(source, PLACE, LIMITS)
    assert error.value.kind == kind


def test_resizing_is_pillows():
    array = gradient(40, 60)
    theirs = np.asarray(Image.fromarray(array).resize((30, 20), Image.Resampling.BICUBIC))
    assert (resized(array, 20, 30) == theirs).all()
    assert resized(array, 40, 60) is array
