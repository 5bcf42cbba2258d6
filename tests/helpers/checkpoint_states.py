"""A small training state for the tests of this folder, and equality to the bit."""

from typing import Any

import torch

from ftrain import tree
from ftrain.step.state import TrainState


def training_state(seed: int = 0, *, rows: int = 6) -> TrainState:
    """Parameters in two dtypes, moments that are zero, a step, and every kind of extra leaf."""
    numbers = torch.Generator().manual_seed(seed)
    params = {
        "embed_VD": torch.randn(rows, 4, generator=numbers),
        "layers": [{"w_DF": torch.randn(4, 8, generator=numbers).bfloat16()} for _ in range(2)],
    }
    moments = tree.map(torch.zeros_like, params)
    extra = {"position": seed, "ratio": 0.1, "name": "réglage/1", "shuffled": True, "key": torch.tensor([seed, 7])}
    return TrainState(params, {"mu": moments}, torch.tensor(seed), extra)


def same_bits(a: Any, b: Any) -> bool:
    """Are two trees equal in structure, types, dtypes and every bit?"""
    if tree.flatten(a)[1] != tree.flatten(b)[1]:
        return False
    return all(_equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def _equal(x: Any, y: Any) -> bool:
    if not isinstance(x, torch.Tensor):
        return type(x) is type(y) and repr(x) == repr(y)
    if (x.dtype, x.shape, x.device) != (y.dtype, y.shape, y.device):
        return False
    if x.numel() == 0:
        return True
    return torch.equal(x.contiguous().reshape(-1).view(torch.uint8), y.contiguous().reshape(-1).view(torch.uint8))
