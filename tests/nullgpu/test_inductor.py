"""Inductor compiles every run of elementwise ops of a step for sm_90, and the step then launches fewer kernels."""

import pytest
from case import Case


@pytest.mark.parametrize("model", ["dense", "moe", "dit"])
def test_fused_kernels_take_the_place_of_many(model, measure):
    plain, fused = (measure(Case(model, backend=backend))["launches"] for backend in ("aten", "inductor"))
    assert fused["TRITON"] > 0
    assert sum(fused.values()) < 0.8 * sum(plain.values())
