import io

import numpy as np
import pytest

pytest.importorskip("av")

import av

from ftrain.data.media.film_frames import film_header, frames_at
from ftrain.data.media.limits import Limits
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place
from tests.helpers.film_files import write_film

PLACE = Place("rows/chat.jsonl", 4)


def film(frames=24, rate=8, size=(48, 64), sound=False):
    """Frame i is a grey of 10 * i; losslessly coded."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "bgr0"
        for i in range(frames):
            array = np.full((*size, 3), 10 * i % 256, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(
    ("source", "limits", "kind"),
    [
        (film(), Limits(pixels=100), "media too large"),
        (film(), Limits(seconds=1.0), "media too large"),
        (film(), Limits(frames=5), "media too large"),
        (film(), Limits(decoded_bytes=10_000), "media too large"),
        (film()[:300], Limits(), "broken media"),
        (b"no film", Limits(), "broken media"),
        ("none.mp4", Limits(), "media missing"),
    ],
)
def test_what_is_too_large_or_no_film_is_a_named_reject(source, limits, kind):
    def read():
        return frames_at(source, PLACE, limits, range(film_header(source, PLACE, limits, rate=8).frames))

    with pytest.raises(BadRow, match=r"row 4: ") as error:
        read()
    assert error.value.kind == kind


def test_a_film_that_breaks_off_is_refused_and_one_frame_too_many_in_its_header_is_not():
    whole = film(60)
    assert frames_at(whole, PLACE, Limits(), [0, 7, 59, 60, 62]).mean(axis=(1, 2, 3)).tolist() == [
        0.0, 70.0, 10 * 59 % 256, 10 * 59 % 256, 10 * 59 % 256
    ]  # fmt: skip
    cut = whole[: len(whole) // 2]
    header = film_header(cut, PLACE, Limits(), rate=2.0)
    assert header.frames == 60
    with pytest.raises(BadRow, match=r"breaks off behind frame .*: its header tells of 60 or more") as error:
        frames_at(cut, PLACE, Limits(), range(header.frames))
    assert error.value.kind == "broken media"


def test_a_film_whose_sound_is_longer_has_its_own_frames_and_is_refused_where_it_breaks_off(tmp_path):
    name = tmp_path / write_film(tmp_path / "heard.mkv", frames=12, seconds=8.0)
    assert film_header(str(name), PLACE, Limits(), rate=2.0).frames == 12
    cut = name.read_bytes()[: name.stat().st_size // 2]
    with pytest.raises(BadRow, match=r"breaks off at \d") as error:
        film_header(cut, PLACE, Limits(), rate=2.0)
    assert error.value.kind == "broken media"
