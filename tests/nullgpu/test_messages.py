"""All ranks of a mesh ask NCCL for the same messages in the same order: anything else hangs on a cluster."""

import re

import pytest
from case import Case


def without_peers(messages):
    return [re.sub(r" peer -?\d+", "", message) for message in messages]


@pytest.mark.parametrize("axes", [{"shard": 2}, {"replicate": 2}, {"sequence": 2}], ids=str)
def test_ranks_send_the_same_in_one_order(axes, measure_mesh):
    first, second = (found["messages"] for found in measure_mesh(Case("moe"), **axes))
    assert first
    assert without_peers(first) == without_peers(second)


def test_sharding_gathers_and_scatters_in_buckets(measure_mesh):
    """A layer has a dozen parameters; they travel together."""
    messages = measure_mesh(Case("moe"), shard=2)[0]["messages"]
    kinds = [message.split(" ")[0] for message in messages]
    assert 0 < kinds.count("all_gather") <= 3
    assert 0 < kinds.count("reduce_scatter") <= 2
