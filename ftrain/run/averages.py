"""The running average of what is trained (`ftrain.optim.ema`): where it is in a state, and a state that has it."""

from typing import Any

from ftrain import tree
from ftrain.modules.spec import Tree
from ftrain.optim.ema import EmaState
from ftrain.step.state import TrainState


def average_of(state: TrainState) -> Tree | None:
    """The average in a state's optimizer; None where it keeps none."""
    found = _found(state.opt_state)
    return None if found is None else found.average


def with_average(state: TrainState) -> TrainState:
    """The state with the average in the place of what is trained, in its dtypes; the same where there is none."""
    average = average_of(state)
    if average is None:
        return state
    return state.replace(params=tree.map(lambda old, new: new.to(old.dtype), state.params, average))


def begin_average(state: TrainState) -> None:
    """Let the average begin with the parameters as they are now, such as those of a folder."""
    average = average_of(state)
    if average is not None:
        tree.map(lambda old, new: new.copy_(old), state.params, average)


def _found(opt_state: Any) -> EmaState | None:
    if isinstance(opt_state, EmaState):
        return opt_state
    inner = opt_state if isinstance(opt_state, tuple) else ()
    return next((found for found in map(_found, inner) if found is not None), None)
