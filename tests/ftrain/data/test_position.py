"""A position goes through a checkpoint."""

import numpy as np
import pytest

from ftrain.checkpoint import restore, save
from ftrain.data.position import Position

HELD = np.array([[5, 0, 2], [9, 1, 2]])


def test_a_position_is_saved_and_restored(tmp_path):
    position = Position(
        order=2**62, budget=64, step=3, next=11, documents=9, tokens=500, rejected=1, slots=8, held=HELD
    )
    save({"data": position.tree(16)}, tmp_path, 3)
    found = Position.of(restore({"data": Position.abstract(16)}, tmp_path)["data"])
    assert np.array_equal(found.held, HELD)
    assert {k: v for k, v in vars(found).items() if k != "held"} == {
        k: v for k, v in vars(position).items() if k != "held"
    }


def test_what_is_no_position_is_refused():
    tree = Position(order=1, budget=8, held=HELD).tree(2)
    with pytest.raises(ValueError, match="2 documents wait for their packs, and there is room for 1"):
        Position(order=1, budget=8, held=HELD).tree(1)
    with pytest.raises(ValueError, match="a position has order, budget"):
        Position.of({name: leaf for name, leaf in tree.items() if name != "step"})
    with pytest.raises(ValueError, match=r"held of a position has shape \[3\]"):
        Position.of({**tree, "held": np.zeros(3, np.int64)})
