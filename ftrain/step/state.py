"""The state of a training run: parameters, optimizer state, step count, and whatever else a recipe carries."""

from typing import Any

import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.transform import Transform, apply_updates


@tree.struct
class TrainState:
    """What a training step carries on: an example of a state, which any tree of tensors may replace.

    - `params`: tree of parameters, which are differentiated.
    - `opt_state`: of the optimizer.
    - `step`: 0-d int64, updates made so far.
    - `extra`: any further tree of tensors (balance biases, averaged weights, keys).

    >>> import torch
    >>> from ftrain import TrainState, optim
    >>> tx = optim.sgd(0.5)
    >>> state = TrainState.create({"w": torch.tensor([1.0, 2.0])}, tx)
    >>> state = state.apply(tx, {"w": torch.tensor([2.0, 0.0])})
    >>> state.params["w"], int(state.step)
    (tensor([0., 2.]), 1)
    """

    params: Any
    opt_state: Any
    step: Tensor
    extra: Any = ()

    @staticmethod
    def create(params: Any, tx: Transform, *, extra: Any = ()) -> "TrainState":
        """A state at step 0: the tree `params` with a fresh optimizer state of `tx`, on the device of its first leaf.
        `extra`: as in `TrainState`.
        """
        device = tree.flatten(params)[0][0].device
        return TrainState(params, tx.init(params), torch.zeros((), dtype=torch.int64, device=device), extra)

    def apply(self, tx: Transform, grads: Any) -> "TrainState":
        """The state after one update with these gradients, a tree with the structure, shapes and dtypes of `params`.
        Errors are those of `tx.update`.
        """
        updates, opt_state = tx.update(grads, self.opt_state, self.params)
        return TrainState(apply_updates(self.params, updates), opt_state, self.step + 1, self.extra)

    def replace(self, **changes: Any) -> "TrainState":
        """A copy with some fields changed. ValueError for a name that is no field."""
        fields = {"params": self.params, "opt_state": self.opt_state, "step": self.step, "extra": self.extra}
        unknown = set(changes) - set(fields)
        if unknown:
            raise ValueError(f"TrainState has no field {', '.join(sorted(unknown))}; it has {', '.join(fields)}")
        return TrainState(**{**fields, **changes})
