"""A student that jumps along the paths of its teacher: regression on pairs of an ODE.

Legend: K steps of the student, N rows, `...` further dims of a row.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.mean import Mean
from ftrain.modules.flow_sampling import path
from ftrain.modules.velocity import Velocity, along, clean, require_descending
from ftrain.tasks.flow import counted, squared_error, uniform_of

KINDS = ("data", "secant")
_PLACE = 3  # stream of the key: those of ftrain.tasks.flow are 0 to 2


def states(teacher: Velocity, noise: Tensor, times: Sequence[float], *, each: int) -> Tensor:
    """Where a teacher is at the times of a student, `[K + 1, N, ...]`, the noise `[N, ...]` first and the data last.

    - `times`: of the student, down to 0. `each`: steps of Euler between two of them.

    No gradient. ValueError for times that do not go down to 0, or less than one step.
    """
    times = tuple(times)
    _require(times, "states")
    if each < 1:
        raise ValueError(f"states: each={each} steps between two times must be at least 1")
    fine = [a + (b - a) * i / each for a, b in itertools.pairwise(times) for i in range(each)]
    with torch.no_grad():
        return torch.stack(path(teacher, noise, [*fine, 0.0])[::each])


@dataclass(frozen=True)
class Trajectory:
    """Regression on the states of a teacher.

    - `kind`: "data", the distance of the predicted data from where the path ends (Liu et al., arXiv 2209.03003; the
      ODE start of CausVid); "secant", the distance from the velocity that leads to the next state in one step.

    ValueError for another kind.
    """

    kind: Literal["data", "secant"] = "data"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"trajectory: kind={self.kind!r} is not one of {', '.join(KINDS)}")

    def loss(
        self,
        student: Velocity,
        states: Tensor,
        times: Sequence[float],
        *,
        ids_N: Tensor,
        key: Tensor,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
    ) -> Mean:
        """The mean squared distance at one of the K times for each sample, all of them as likely.

        Args:
            student: the field that is trained, without guidance.
            states: `[K + 1, N, ...]`, of `states`.
            times: those of the states, down to 0.
            ids_N: int64, the sample of each row. `key`: int64 `[2]`, of the step.
            given_N, valid_N: as in `Flow.loss`; given rows are equal in all states.

        ValueError for times that do not fit.
        """
        times = tuple(times)
        _require(times, "trajectory")
        if len(states) != len(times):
            raise ValueError(f"trajectory: {len(states)} states at {len(times)} times: each time has one")
        place_N = place_of(key, ids_N, len(times) - 1)
        at = torch.tensor(times, dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        x, time_N = taken(states, place_N), at[place_N] if given_N is None else torch.where(given_N, 0, at[place_N])
        counted_N = counted(given_N, valid_N)
        velocity = student(x, time_N)
        if self.kind == "data":
            return squared_error(clean(x, time_N, velocity), states[-1], counted_N)
        step_N = at[place_N + 1] - at[place_N]
        return squared_error(velocity, (taken(states, place_N + 1) - x) / along(step_N, x), counted_N)


def place_of(key: Tensor, ids_N: Tensor, places: int) -> Tensor:
    """One of so many places for each sample, int64 `[N]`; rows of one sample (int64 `ids_N`) have one.

    `key`: int64 `[2]`.

    >>> place_of(random.key(0), torch.tensor([3, 3, 8]), 1).tolist()
    [0, 0, 0]
    """
    return (uniform_of(random.fold_in(key, _PLACE), ids_N) * places).long().clamp(max=places - 1)


def taken(states: Tensor, place_N: Tensor) -> Tensor:
    """Row n of state `place_N[n]`, `[N, ...]`, of states `[K, N, ...]`."""
    index = place_N.view(1, -1, *[1] * (states.dim() - 2)).expand(1, *states.shape[1:])
    return states.gather(0, index)[0]


def _require(times: tuple[float, ...], who: str) -> None:
    require_descending(times, who)
    if times[-1] != 0:
        raise ValueError(f"{who}: times={times} must end at 0, where the data is")
