import io

import numpy as np
import pytest

pytest.importorskip("av")

import av

from ftrain.data.media.film_frames import film_header, frames_at
from ftrain.data.media.limits import Limits
from ftrain.data.media.video import read_video
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place

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


def greys(found):
    return [int(frame.mean()) // 10 for frame in found.frames]


@pytest.mark.parametrize(
    ("rate", "most", "wanted"),
    [
        (2, None, [0, 4, 8, 12, 16, 20]),
        (4, None, list(range(0, 24, 2))),
        (8, None, list(range(24))),
        (100, None, list(range(24))),
        (4, 3, [0, 8, 16]),
        (1, 100, [0, 8, 16]),
    ],
)
def test_frames_are_those_shown_at_the_times_asked_for(rate, most, wanted):
    found = read_video(film(), PLACE, Limits(), rate=rate, most_frames=most)
    assert greys(found) == wanted
    assert found.frames.shape[1:] == (48, 64, 3)
    assert np.abs(found.times * 8 - wanted).max() < 0.1


def test_an_array_is_a_film():
    array = np.zeros((4, 8, 8, 3), np.uint8)
    found = read_video(array, PLACE, Limits(), rate=2.0)
    assert found.times.tolist() == [0.0, 0.5, 1.0, 1.5]


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
    with pytest.raises(BadRow, match=r"row 4: ") as error:
        read_video(source, PLACE, limits, rate=8)
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
