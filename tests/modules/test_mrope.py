"""Places on three axes: lists that can be counted by hand, and both rules of where text goes on behind a video."""

import pytest

from ftrain.modules.mrope import Picture, places


def test_text_alone_counts_on_all_axes():
    assert places(3, 6, []).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


def test_a_picture_stays_at_one_time_and_text_goes_on_behind_its_longer_side():
    found = places(0, 8, [Picture(1, frames=1, rows=2, columns=3)])
    assert found.T.tolist() == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]


@pytest.mark.parametrize(("step", "after", "next_place"), [(1, "extent", 5), (1, "max", 9), (2, "max", 14)])
def test_text_behind_a_long_video(step, after, next_place):
    """Three words, six frames of 2 x 2 tokens, a word: transformers 5 and 4 place it differently."""
    found = places(0, 28, [Picture(3, frames=6, rows=2, columns=2, step=step)], after=after)
    assert found[-1].tolist() == [next_place] * 3
    assert found[3:27:4, 0].tolist() == [3 + step * i for i in range(6)]


def test_steps_that_are_no_whole_numbers_are_cut():
    found = places(0, 4, [Picture(0, frames=4, rows=1, columns=1, step=0.4)])
    assert found[:, 0].tolist() == [0, 0, 0, 1]


def test_pictures_side_by_side_are_apart():
    pair = [Picture(0, frames=1, rows=1, columns=2), Picture(2, frames=1, rows=1, columns=2)]
    assert places(0, 4, pair).tolist() == [[0, 0, 0], [0, 0, 1], [2, 2, 2], [2, 2, 3]]
