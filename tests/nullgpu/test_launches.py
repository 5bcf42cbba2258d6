"""How many launches a layer costs, forward, backward, clipping and AdamW together, and bounds that only ever fall.

A launch costs the host about 6 us, and the card's front end about 2: short kernels make a step wait for launches.
"""

import pytest
from case import Case

PER_LAYER = {
    ("dense", "aten"): 314,
    ("dense", "inductor"): 124,
    ("moe", "aten"): 497,
    ("moe", "inductor"): 213,
}
"""The most launches of a layer: of 4 layers less those of 2, halved. Lower a number when a change makes it lower."""

CROSS_ENTROPY = 1274
"""The most launches of loss and gradients of 8,192 tokens over 151,936 words."""


@pytest.mark.parametrize(("model", "backend"), PER_LAYER)
def test_launches_of_a_layer(model, backend, measure):
    two, four = (measure(Case(model, backend=backend, layers=layers))["launches"] for layers in (2, 4))
    found = {kind: (four.get(kind, 0) - two.get(kind, 0)) / 2 for kind in four}
    print(f"{model} {backend}: {sum(found.values()):g} launches of a layer: {found}")
    assert sum(found.values()) <= PER_LAYER[model, backend]


def test_launches_of_cross_entropy(probe):
    found = probe("cross_entropy")
    print(f"cross entropy: {sum(found['launches'].values())} launches: {found['launches']}")
    assert sum(found["launches"].values()) <= CROSS_ENTROPY
    assert found["waits"] == []
