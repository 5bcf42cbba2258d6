"""Costs of documents."""

import numpy as np
import pytest

from ftrain.data.cost import Cost


def test_flops_of_a_decoder_are_those_of_its_products():
    layers, width, parameters, n = 2, 8, 1000, 6
    scores = sum(2 * 2 * (t + 0.5) * width for t in range(n)) * layers  # each token meets those before it, on average
    whole = Cost.of_sizes(parameters=parameters, layers=layers, width=width)(np.array([n]))
    assert whole.tolist() == [2 * parameters * n + scores]


def test_a_price_is_not_negative_and_something_costs():
    with pytest.raises(ValueError, match="prices are at least 0"):
        Cost(linear=-1.0)
    with pytest.raises(ValueError, match="one is above 0"):
        Cost(linear=0.0)
