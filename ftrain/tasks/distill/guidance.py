"""Guidance learnt by the network itself, so that a sampler calls it once.

Legend: N rows, `...` further dims of a row.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftrain.kernels.mean import Mean
from ftrain.modules.velocity import Velocity, guided
from ftrain.tasks.flow import Flow, Times, squared_error


@dataclass(frozen=True)
class Baked:
    """A student's conditional field learns a teacher's guided one (Meng et al., arXiv 2210.03142, of one scale).

    - `scale`: of the guidance, as `ftrain.modules.velocity.guided` has it. `times`: how times are drawn.

    ValueError for a scale of 1 or less, which is no guidance.
    """

    scale: float
    times: Times = field(default_factory=Times)

    def __post_init__(self) -> None:
        _require("baked", self.scale)

    def loss(
        self,
        student: Velocity,
        conditional: Velocity,
        unconditional: Velocity,
        data: Tensor,
        *,
        ids_N: Tensor,
        key: Tensor,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
    ) -> Mean:
        """The mean squared distance of the student's velocity from the guided one of the two fields of the teacher.

        `data`: `[N, ...]`. `ids_N`: int64, the sample of each row. `key`: int64 `[2]`. `given_N`, `valid_N`,
        errors: as in `Flow.loss`.
        """
        noisy = Flow(self.times).noisy(data, ids_N=ids_N, key=key, given_N=given_N, valid_N=valid_N)
        with torch.no_grad():
            target = guided(conditional, unconditional, self.scale)(noisy.x, noisy.time_N)
        return squared_error(student(noisy.x, noisy.time_N), target, noisy.counted_N)


@dataclass(frozen=True)
class Fused:
    """Flow matching without a teacher, after which the conditional field is the guided one: what has learnt data is
    `unconditional + (conditional - unconditional) / scale`. It also trains on a network that is guided already.

    - `scale`: of the guidance. `flow`: the loss of flow matching.

    ValueError for a scale of 1 or less, which is no guidance.
    """

    scale: float
    flow: Flow = field(default_factory=Flow)

    def __post_init__(self) -> None:
        _require("fused", self.scale)

    def loss(
        self,
        conditional: Velocity,
        unconditional: Velocity,
        data: Tensor,
        *,
        ids_N: Tensor,
        key: Tensor,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
    ) -> Mean:
        """As `Flow.loss`, of `data` `[N, ...]`. `unconditional`: the same network; it gets no gradient, and learns by
        samples whose condition is dropped, in `Flow.loss`.
        """

        def field(x: Tensor, time_N: Tensor) -> Tensor:
            with torch.no_grad():
                without = unconditional(x, time_N)
            return without + (conditional(x, time_N) - without) / self.scale

        return self.flow.loss(field, data, ids_N=ids_N, key=key, given_N=given_N, valid_N=valid_N)


def _require(who: str, scale: float) -> None:
    if not scale > 1:
        raise ValueError(f"{who}: scale={scale} must be above 1, which is no guidance")
