"""Videos of a digit in motion."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.omni.video import DIRECTIONS, VideoConfig, moving

IMAGE = np.random.default_rng(0).uniform(-1, 1, (8, 8, 1)).astype(np.float32)
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


@given(st.sampled_from(DIRECTIONS), st.integers(2, 5), st.integers(1, 3), st.integers(0, 3))
def test_each_frame_is_the_one_before_moved(direction, frames, speed, room):
    cfg = VideoConfig(frames, 8 + (frames - 1) * speed + 2 * room, speed)
    video = moving(IMAGE, direction, cfg=cfg)
    assert video.shape == (frames, cfg.side, cfg.side, 1)
    by = tuple(speed * step for step in STEPS[direction])
    for before, after in pairwise(video):
        np.testing.assert_array_equal(np.roll(before, by, axis=(0, 1)), after)
    assert all((frame != -1).sum() == 64 for frame in video)


def test_opposite_motions_are_each_other_played_backwards():
    cfg = VideoConfig()
    np.testing.assert_array_equal(moving(IMAGE, "left", cfg=cfg), moving(IMAGE, "right", cfg=cfg)[::-1])
    np.testing.assert_array_equal(moving(IMAGE, "up", cfg=cfg), moving(IMAGE, "down", cfg=cfg)[::-1])


def test_bad_configs_and_directions_are_named():
    with pytest.raises(ValueError, match="side of 12, 14"):
        VideoConfig(frames=3, side=11, speed=2)
    with pytest.raises(ValueError, match="'sideways' is not one of"):
        moving(IMAGE, "sideways", cfg=VideoConfig())
