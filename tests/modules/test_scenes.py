"""Videos whose tokens are mixed with those of their sound: places counted by hand, and those of a loop over tokens."""

import numpy as np
import pytest

from ftrain.modules.mrope import Picture, places
from ftrain.modules.scenes import scene


def laid(kinds, first=2):
    """Where the video's and the sound's tokens are, of a string of v and a."""
    return tuple(np.array([first + i for i, kind in enumerate(kinds) if kind == one]) for one in "va")


def placed(kinds, video, *, interleave, exact=False, before=4, behind=2):
    at_V, at_A = laid(kinds, before)
    total = before + len(kinds) + behind
    found = scene(video._replace(first=before), at_V, at_A, interleave=interleave, exact=exact, room=total)
    return places(0, total, [found], exact=exact).T.tolist()


def test_stretches_of_time_each_have_their_frames_then_their_sound():
    """Two words, two tokens in front that share a place, two frames 2 places apart, stretches of 2, two behind."""
    video = Picture(0, frames=2, rows=1, columns=2, step=1.0, rate=2.0)
    time, row, column = placed("vvaavva", video, interleave=2, behind=3)
    assert time == [0, 1, 2, 2, 3, 3, 3, 4, 5, 5, 5, 6, 6, 7]
    assert row == [0, 1, 2, 2, 3, 3, 3, 4, 3, 3, 5, 6, 6, 7]
    assert column == [0, 1, 2, 2, 3, 4, 3, 4, 3, 4, 5, 6, 6, 7]


def test_text_goes_on_behind_the_stretch_that_ends_it_though_another_reached_further():
    """As transformers has it: the sound of the only stretch is last, and a wide picture's columns are beyond it."""
    time, _, column = placed("vvvvvva", Picture(0, 1, 1, 6), interleave=5)
    assert column[4:] == [3, 4, 5, 6, 7, 8, 3, 4, 4]
    assert time[-1] == 4


def test_a_late_frame_begins_the_next_stretch_only():
    """Frames 5 stretches apart: each token goes one stretch further, as the processor cuts them."""
    video = Picture(0, frames=2, rows=1, columns=2, step=5.0, rate=2.0)
    time, *_ = placed("vvaavaav", video, interleave=2)
    assert time == [0, 1, 2, 2, 3, 3, 3, 4, 13, 5, 6, 13, 14, 14]


def test_tokens_are_mixed_by_time_and_times_need_not_be_whole():
    video = Picture(0, frames=3, rows=1, columns=1, step=0.5, rate=3.0)
    time, row, _ = placed("vaavav", video, interleave=None, exact=True, before=2)
    assert time == [0, 1, 2, 2, 3, 3.5, 4, 5, 6, 7]
    assert row == [0, 1, 2, 2, 3, 2, 4, 2, 6, 7]


@pytest.mark.parametrize(
    ("kinds", "interleave", "message"),
    [
        ("avv", 2, "at token 4 are not mixed by stretches of 2 places"),
        ("vvav", None, "at token 4 are not mixed by time"),
        ("v.va", None, "at token 4 do not stand side by side"),
    ],
)
def test_tokens_that_are_mixed_in_another_way_are_refused(kinds, interleave, message):
    by_time = interleave is None
    video = Picture(0, kinds.count("v"), 1, 1, step=0.5 if by_time else 1.0)
    with pytest.raises(ValueError, match=message):
        placed(kinds, video, interleave=interleave, exact=by_time)


def test_tokens_in_front_and_behind_must_be_there():
    with pytest.raises(ValueError, match="have not two tokens in front and two behind"):
        placed("va", Picture(0, 1, 1, 1), interleave=2, behind=1)
