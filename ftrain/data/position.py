"""How far a run has read its data: a small tree that goes into a checkpoint beside the state.

It holds places of the order and no documents, so it is the same for any number of workers and ranks, and a run goes on
from it with other numbers of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

_COLUMNS = 3  # of what is held


@dataclass(frozen=True, eq=False)
class Position:
    """After `step` steps.

    - `order`: which order the places are of (`Order.fingerprint`); `budget`: tokens of a pack.
    - `next`: the first place that was not read.
    - `held`: int64 `[n, 3]`, what was read and waits for its pack, the oldest first: its place, which piece of its
      document it is (0 where documents are whole), and the step before which it was read.
    - `documents`, `tokens`: that were trained on; `rejected`: rows that were read and left out.
    - `slots`: documents for which a pack's offsets have room.
    """

    order: int
    budget: int
    step: int = 0
    next: int = 0
    documents: int = 0
    tokens: int = 0
    rejected: int = 0
    slots: int = 0
    held: np.ndarray = field(default_factory=lambda: np.zeros((0, _COLUMNS), np.int64))

    def tree(self, capacity: int) -> dict[str, Any]:
        """For a checkpoint: integers, and `held` as an int64 tensor `[capacity, 3]`, its free rows -1.

        ValueError where more is held.
        """
        if len(self.held) > capacity:
            raise ValueError(f"{len(self.held)} documents wait for their packs, and there is room for {capacity}")
        held = np.full((capacity, _COLUMNS), -1, np.int64)
        held[: len(self.held)] = self.held
        return {name: getattr(self, name) for name in _NUMBERS} | {"held": torch.from_numpy(held)}

    @staticmethod
    def of(tree: Mapping[str, Any]) -> "Position":
        """From what `tree` gave. ValueError where leaves are missing or of other shapes.

        >>> position = Position(order=7, budget=1024, step=3, held=np.array([[5, 0, 2]]))
        >>> Position.of(position.tree(4)).held.tolist()
        [[5, 0, 2]]
        """
        if set(tree) != {*_NUMBERS, "held"}:
            raise ValueError(
                f"a position has {', '.join([*_NUMBERS, 'held'])}, and this tree {', '.join(sorted(tree))}"
            )
        held = np.asarray(tree["held"], np.int64)
        if held.ndim != 2 or held.shape[1] != _COLUMNS:
            raise ValueError(f"held of a position has shape {list(held.shape)}, not [capacity, {_COLUMNS}]")
        return Position(**{name: int(tree[name]) for name in _NUMBERS}, held=held[held[:, 0] >= 0])

    @staticmethod
    def abstract(capacity: int) -> dict[str, Any]:
        """What a checkpoint is restored into: `tree` of a position that nobody knows yet."""
        held = torch.empty((capacity, _COLUMNS), dtype=torch.int64, device="meta")
        return dict.fromkeys(_NUMBERS, 0) | {"held": held}


_NUMBERS = ("order", "budget", "step", "next", "documents", "tokens", "rejected", "slots")
