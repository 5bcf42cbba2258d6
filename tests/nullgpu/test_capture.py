"""A whole training step is captured as one CUDA graph; from then on a step is one launch."""

import pytest
from case import Case


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_donated_step_is_captured_once_and_unbroken(model, measure):
    found = measure(Case(model, backend="cudagraph"))
    assert found["captures"] == ["CAPTURE begin", "CAPTURE end"]


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_captured_step_is_one_launch_of_a_graph(model, measure):
    """The batch, which lies where the graph does not read, is copied to where it does; nothing else runs."""
    launches = measure(Case(model, backend="cudagraph"))["launches"]
    assert launches["GRAPH"] == 1
    assert set(launches) <= {"GRAPH", "COPY", "KERNEL"}
    assert sum(launches.values()) <= 1 + 8
