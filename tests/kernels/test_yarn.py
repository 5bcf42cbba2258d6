"""YaRN: which frequencies stay and which are divided, and what a scaling without sense says."""

import dataclasses
import math

import pytest
import torch

from ftrain.kernels.rope import rope_table
from ftrain.kernels.yarn import YarnScaling, sharpening

SCALING = YarnScaling(8.0, 1000, fast_turns=8.0, slow_turns=0.5, amplitude=sharpening(8.0))


def table(scaling, position):
    return rope_table(torch.tensor([position]), head_dim=24, base=1e5, scaling=scaling, dtype=torch.float64)


def test_slow_frequencies_are_divided_and_fast_ones_stay():
    cos, sin = (x[0] for x in table(SCALING, 1.0))
    scaled, plain = torch.atan2(sin, cos), 1e5 ** (-torch.arange(12, dtype=torch.float64) / 12)
    ratio, turns = scaled / plain, plain * 1000 / (2 * math.pi)
    # the fade begins and ends at whole places, up to one beyond
    torch.testing.assert_close(ratio[turns > 8 * 1e5 ** (1 / 12)], torch.ones(3, dtype=torch.float64))
    slow = ratio[turns < 0.5 / 1e5 ** (1 / 12)]
    torch.testing.assert_close(slow, torch.full_like(slow, 1 / 8), rtol=1e-9, atol=0)
    assert len(slow) > 2
    assert (scaled.diff() < 0).all()
    assert len(ratio[(ratio < 1) & (ratio > 1 / 8)]) > 2


def test_cosines_and_sines_are_enlarged():
    cos, sin = table(SCALING, 3.0)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, (0.1 * math.log(8.0) + 1) ** 2))
    assert sharpening(0.5) == 1.0


def test_places_between_count_where_they_are_not_rounded():
    rounded, exact = (table(dataclasses.replace(SCALING, whole_places=w), 1.0)[1] for w in (True, False))
    assert not torch.allclose(rounded, exact)


@pytest.mark.parametrize("change", [{"factor": 0.5}, {"slow_turns": 8.0}, {"original_length": 0}, {"amplitude": 0.0}])
def test_a_scaling_without_sense_is_refused(change):
    with pytest.raises(ValueError, match="factor must be at least 1, original_length and amplitude positive"):
        dataclasses.replace(SCALING, **change)
