"""The state of a training run: parameters, optimizer state, step count, and whatever else a recipe carries."""

from typing import Any

import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.transform import Transform, apply_updates


@tree.struct
class TrainState:
    """`params`: differentiated; `opt_state`: of the transform; `step`: int64 scalar; `extra`: any further tree of
    tensors that a step carries on (balance biases, averaged weights, keys).
    """

    params: Any
    opt_state: Any
    step: Tensor
    extra: Any = ()

    @staticmethod
    def create(params: Any, tx: Transform, *, extra: Any = ()) -> "TrainState":
        """A state at step 0 with a fresh optimizer state."""
        device = tree.flatten(params)[0][0].device
        return TrainState(params, tx.init(params), torch.zeros((), dtype=torch.int64, device=device), extra)

    def apply(self, tx: Transform, grads: Any) -> "TrainState":
        """The state after one update with these gradients."""
        updates, opt_state = tx.update(grads, self.opt_state, self.params)
        return TrainState(apply_updates(self.params, updates), opt_state, self.step + 1, self.extra)

    def replace(self, **changes: Any) -> "TrainState":
        """A copy with some fields changed."""
        fields = {"params": self.params, "opt_state": self.opt_state, "step": self.step, "extra": self.extra}
        unknown = set(changes) - set(fields)
        if unknown:
            raise ValueError(f"TrainState has no field {', '.join(sorted(unknown))}; it has {', '.join(fields)}")
        return TrainState(**{**fields, **changes})
