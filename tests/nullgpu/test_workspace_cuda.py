"""What an op allocates on CUDA beyond its results is what its rule says, as the caching allocator saw it."""

import pytest
from reductions import SHAPES

SLACK_BYTES = 20_000  # flags of blocks, and sums along rows, which have no rule


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_reduction_takes_the_buffer_that_its_rule_says(shape, ask):
    for case, planned, measured in ask("reductions.py")[str(shape)]:
        assert measured == pytest.approx(planned, rel=0.01, abs=SLACK_BYTES), case


def test_a_sum_over_tokens_takes_a_large_buffer(ask):
    """The gradient of a bias of 9,216 numbers over 32,768 tokens: what is summed is the size of one tensor more."""
    planned = [
        planned for case, planned, _ in ask("reductions.py")[str((32768, 9216))] if case.startswith("sum over 0")
    ]
    assert max(planned) > 100e6
