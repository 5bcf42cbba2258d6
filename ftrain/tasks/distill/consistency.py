"""Consistency: the data that a student predicts is the same all along a path of its teacher.

Legend: N rows, `...` further dims of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftrain.kernels.mean import Mean
from ftrain.modules.velocity import Velocity, along, clean, moved, require_descending
from ftrain.tasks.distill.trajectory import place_of
from ftrain.tasks.flow import Flow, Times, squared_error


@dataclass(frozen=True)
class Consistency:
    """Consistency distillation on a grid (Song et al., arXiv 2303.01469).

    - `times`: of the grid, down to 0. The teacher takes one step between neighbours.

    ValueError for times that do not go down to 0: only there the student is told what data is.
    """

    times: Sequence[float]

    def __post_init__(self) -> None:
        require_descending(tuple(self.times), "consistency")
        if self.times[-1] != 0:
            raise ValueError(f"consistency: times={tuple(self.times)} must end at 0, where the data is")

    def loss(
        self,
        student: Velocity,
        average: Velocity,
        teacher: Velocity,
        data: Tensor,
        *,
        ids_N: Tensor,
        key: Tensor,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
    ) -> Mean:
        """The mean squared distance of the data that the student predicts from what its average predicts one step on.

        `average`: the student with slowly moving parameters (`roles.averaged`), or the student itself. `teacher`: with
        guidance, if it is to be learnt as well. Other arguments (`data` `[N, ...]`, `key` int64 `[2]`) and errors are
        those of `Progressive.loss`.
        """
        at = torch.tensor(list(self.times), dtype=torch.float32, device=data.device)
        place_N = place_of(key, ids_N, len(self.times) - 1)
        noisy = Flow().noisy(data, ids_N=ids_N, key=key, time_N=at[place_N], given_N=given_N, valid_N=valid_N)
        time_N, to_N = noisy.time_N, torch.minimum(at[place_N + 1], noisy.time_N)  # given rows stay at 0
        with torch.no_grad():
            x = moved(noisy.x, time_N, to_N, teacher(noisy.x, time_N))
            target = clean(x, to_N, average(x, to_N))
        return squared_error(clean(noisy.x, time_N, student(noisy.x, time_N)), target, noisy.counted_N)


@dataclass(frozen=True)
class ContinuousConsistency:
    """Consistency in the limit of a fine grid: `u = v - t du/dt` along the path of the teacher's velocity v (Lu and
    Song, arXiv 2410.11081; MeanFlow to time 0, Geng et al., arXiv 2505.13447).

    - `epsilon`: du/dt is a central difference of so much time, of two calls without gradient: no derivative of the
      network in forward mode is needed, so every kernel serves.
    - `bound`: the derivative's root mean square in a row is divided by itself plus this number, times 1 plus it; None
      leaves it. A network that is far from consistent has derivatives that drown the velocity.
    - `times`: how times are drawn.

    ValueError for numbers that are not positive, or an epsilon of 0.5 or more.
    """

    epsilon: float = 5e-3
    bound: float | None = None
    times: Times = field(default_factory=Times)

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 0.5:
            raise ValueError(f"consistency: epsilon={self.epsilon} must lie between 0 and 0.5")
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"consistency: bound={self.bound} must be positive, or None")

    def loss(
        self,
        student: Velocity,
        teacher: Velocity | None,
        data: Tensor,
        *,
        ids_N: Tensor,
        key: Tensor,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
    ) -> Mean:
        """The mean squared distance of the student's velocity from `v - t du/dt`.

        `teacher`: None takes `noise - data` for v, whose mean is the field without guidance: training from data alone.
        Other arguments and errors are those of `Progressive.loss`, with `data` `[N, ...]`.
        """
        noisy = Flow(self.times).noisy(data, ids_N=ids_N, key=key, given_N=given_N, valid_N=valid_N)
        with torch.no_grad():
            velocity = noisy.target.to(noisy.x.dtype) if teacher is None else teacher(noisy.x, noisy.time_N)
            slope = self.slope(student, noisy.x, noisy.time_N, velocity, given_N=given_N)
            target = velocity - along(noisy.time_N, noisy.x) * slope
        return squared_error(student(noisy.x, noisy.time_N), target, noisy.counted_N)

    def slope(
        self, student: Velocity, x: Tensor, time_N: Tensor, velocity: Tensor, *, given_N: Tensor | None = None
    ) -> Tensor:
        """du/dt `[N, ...]` at rows `x` that move by `velocity`, both `[N, ...]`; at the ends of time to one side.

        Rows that are `given_N` (bool) stay where they are; of them nothing is said.
        """
        before_N, after_N = (time_N - self.epsilon).clamp(min=0), (time_N + self.epsilon).clamp(max=1)
        if given_N is not None:
            before_N, after_N = torch.where(given_N, time_N, before_N), torch.where(given_N, time_N, after_N)
        early, late = (student(moved(x, time_N, then_N, velocity), then_N) for then_N in (before_N, after_N))
        found = (late - early) / along(after_N - before_N, x)
        if self.bound is None:
            return found
        size = found.flatten(1).square().mean(1).sqrt()
        return found * along((1 + self.bound) / (size + self.bound), x)
