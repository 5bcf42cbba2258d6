"""Real digits: what is held out, and how training images are bent."""

import numpy as np
import pytest

from experiments.omni import digits, judge


def test_the_last_fifth_of_the_writers_is_held_out():
    trained, held_out = digits.split()
    assert len(trained.labels_N) + len(held_out.labels_N) == 1797
    assert len(held_out.labels_N) == 359
    assert trained.places_N.max() < held_out.places_N.min()
    assert set(trained.labels_N) == set(held_out.labels_N) == set(range(10))
    for part in (trained, held_out):
        assert part.images_NHWC.shape[1:] == (8, 8, 1)
        assert part.images_NHWC.dtype == np.float32
        assert part.images_NHWC.min() == -1
        assert part.images_NHWC.max() == 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_leaves_one_side_empty_is_refused(share):
    with pytest.raises(ValueError, match=f"held_out={share}"):
        digits.split(held_out=share)


def test_no_image_is_on_both_sides():
    trained, held_out = digits.split()
    seen = {image.tobytes() for image in trained.images_NHWC}
    assert not seen & {image.tobytes() for image in held_out.images_NHWC}


def test_bends_keep_their_label_and_stay_near_their_image():
    trained = digits.Digits(*(part[:50] for part in digits.split()[0]))
    more = digits.enlarge(trained, copies=3, seed=1)
    assert len(more.labels_N) == 200
    np.testing.assert_array_equal(more.images_NHWC[:50], trained.images_NHWC)
    np.testing.assert_array_equal(more.labels_N, trained.labels_N[more.places_N])
    assert np.abs(more.images_NHWC).max() <= 1
    apart = ((more.images_NHWC[50:, None] - trained.images_NHWC[None]) ** 2).sum(axis=(2, 3, 4))
    own = apart[np.arange(150), more.places_N[50:]]
    assert own.min() > 0
    assert (apart < own[:, None]).mean() < 0.05
    np.testing.assert_array_equal(more.images_NHWC, digits.enlarge(trained, copies=3, seed=1).images_NHWC)
    assert not np.array_equal(more.images_NHWC, digits.enlarge(trained, copies=3, seed=2).images_NHWC)


def test_no_bend_changes_nothing():
    images = digits.split()[0].images_NHWC[:20]
    still = digits.Warp(turn=0, zoom=0, shear=0, shift=0)
    np.testing.assert_allclose(digits.bend(images, np.random.default_rng(0), warp=still), images, atol=1e-6)


def test_the_judge_knows_the_digits_of_other_hands():
    trained, held_out = digits.split()
    one = judge.train(trained, held_out, copies=0)
    assert one.held_out_accuracy > 0.97
    assert one.accuracy(held_out.images_NHWC, held_out.labels_N) == one.held_out_accuracy
    assert one.accuracy(held_out.images_NHWC, (held_out.labels_N + 1) % 10) < 0.03


def test_the_judge_refuses_other_shapes_and_counts():
    trained, _ = digits.split()
    one = judge.train(trained, trained, copies=0)
    with pytest.raises(ValueError, match=r"\[N, 8, 8, 1\], got \[4, 8, 8\]"):
        one.recognise(np.zeros((4, 8, 8)))
    with pytest.raises(ValueError, match="4 images and 3 labels"):
        one.accuracy(np.zeros((4, 8, 8, 1)), np.zeros(3))
