"""Progressive distillation: one step of the student does what two steps of the teacher do.

Legend: N rows, `...` further dims of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftrain.kernels.mean import Mean
from ftrain.modules.velocity import Velocity, along, moved, require_descending
from ftrain.tasks.distill.trajectory import place_of
from ftrain.tasks.flow import Flow, squared_error


@dataclass(frozen=True)
class Progressive:
    """Salimans and Ho, arXiv 2202.00512, for velocities. A round halves the steps, and its student is the next teacher.

    - `times`: of the student, going down. Its teacher takes two steps between neighbours, by way of their middle.

    ValueError for times that do not go down.
    """

    times: Sequence[float]

    def __post_init__(self) -> None:
        require_descending(tuple(self.times), "progressive")

    def loss(
        self,
        student: Velocity,
        teacher: Velocity,
        data: Tensor,
        *,
        ids_N: Tensor,
        key: Tensor,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
    ) -> Mean:
        """The mean squared distance from the velocity that leads where the teacher goes in two steps.

        `teacher`: in the first round with guidance, if it is to be learnt as well. `data`: `[N, ...]`, which gets noise
        of one of the times. `ids_N`: int64, the sample of each row. `key`: int64 `[2]`. `given_N`, `valid_N`, errors:
        as in `Flow.loss`.
        """
        at = torch.tensor(list(self.times), dtype=torch.float32, device=data.device)
        place_N = place_of(key, ids_N, len(self.times) - 1)
        noisy = Flow().noisy(data, ids_N=ids_N, key=key, time_N=at[place_N], given_N=given_N, valid_N=valid_N)
        time_N, to_N = noisy.time_N, torch.minimum(at[place_N + 1], noisy.time_N)  # given rows stay at 0
        with torch.no_grad():
            middle_N = (time_N + to_N) / 2
            x = moved(noisy.x, time_N, middle_N, teacher(noisy.x, time_N))
            x = moved(x, middle_N, to_N, teacher(x, middle_N))
            target = (x - noisy.x) / along(to_N - time_N, x)
        return squared_error(student(noisy.x, time_N), target, noisy.counted_N)
