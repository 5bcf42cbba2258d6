"""In its steady state a step never makes the host wait for the device, and takes no memory from the driver.

A wait of the host empties the card's queue: after it, every launch costs its latency.
"""

import pytest
from case import Case

MODELS = ("dense", "moe", "dit", "dit_text", "omni")
CASES = [
    *[Case(model) for model in MODELS],
    *[Case(model, backend="inductor") for model in ("dense", "moe", "dit")],
    *[Case(model, backend="cudagraph") for model in ("dense", "moe")],
    *[Case("dense", layers=4, tokens=16384, remat=remat) for remat in ("layer", "offload", "budget")],
]
MESHES = ({"shard": 2}, {"replicate": 2}, {"sequence": 2})


def assert_never_waits(found):
    assert found["syncs"] == []
    assert found["host_waits"] == []
    assert found["allocations"] == []
    assert found["missing"] == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_never_waits(case, measure):
    found = measure(case)
    assert_never_waits(found)
    assert found["traces"] == 1


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_step_on_a_mesh_over_nccl_never_waits(axes, measure_mesh):
    for found in measure_mesh(Case("moe"), **axes):
        assert_never_waits(found)


@pytest.mark.parametrize("case", [Case("dense"), Case("dense", backend="cudagraph")], ids=str)
def test_numbers_of_a_step_are_read_while_the_next_is_under_way(case, ask):
    """Two steps are given without a wait; reading the first then waits for its copy alone, not for the stream."""
    found = ask("measure_late.py", case.as_json())
    assert found["given"] == found["allocations"] == []
    assert [line.split()[:2] for line in found["late"]] == [["SYNC", "event"]]
    assert [line.split()[:2] for line in found["at_once"]] == [["SYNC", "stream"]], "what reading at once would do"
