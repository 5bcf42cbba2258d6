"""What the crash benches save, and how they look at what is left of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ftrain import tree
from ftrain.checkpoint import latest, restore


@dataclass(frozen=True)
class Crash:
    """How many `kills`, of saves of how many `mib` of state by how many `ranks`; `json` receives the result; `seed`
    fixes the moments. `ranks` above 1: of so many processes that save together one or all are killed.
    """

    kills: int = 100
    mib: float = 8.0
    database: bool = True
    ranks: int = 1
    seed: int = 0
    json: Path | None = None


def state_of(step: int, mib: float) -> dict:
    """A state of about this size that is a function of the step alone."""
    rows = max(1, int(mib * 2**20 / 4 / 256 / 8))
    numbers = torch.Generator().manual_seed(step)
    params = {f"w{i}": torch.randn(rows, 256, generator=numbers) for i in range(4)}
    moments = {f"w{i}": torch.randn(rows, 256, generator=numbers) for i in range(4)}
    return {"params": params, "opt_state": moments, "step": torch.tensor(step), "position": step * 10}


def verified_step(root: Path, at_least: int, mib: float) -> int:
    """The latest step, 0 if there is none, after comparing it bit by bit; RuntimeError when it is lost or differs."""
    step = latest(root) or 0
    if step < at_least:
        raise RuntimeError(f"step {at_least} was saved, and now the latest is {step}")
    if step == 0:
        return 0
    expected = state_of(step, mib)
    found = restore(expected, root)
    equal = [torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip_leaves(found, expected)]
    if not all(equal):
        raise RuntimeError(f"step {step} restores with {equal.count(False)} leaves that differ")
    return step


def zip_leaves(a: dict, b: dict) -> Iterator[tuple]:
    """The leaves of two trees of one structure, side by side."""
    tree.require_same(a, b, names=("the restored state", "the saved state"))
    return zip(tree.leaves(a), tree.leaves(b), strict=True)
