"""Distribution matching: a student's samples move to where a teacher finds them likelier than a critic does.

The critic is a field that learns the student's own samples as it changes. The direction at a sample is the difference
of the data that both predict for it under noise; the student follows it through its own rollout.

Legend: N rows, `...` further dims of a row.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ftrain.kernels.mean import Mean, sum_over_batch
from ftrain.modules.velocity import Velocity, clean
from ftrain.tasks.document_sums import first_tokens, sum_by_run
from ftrain.tasks.flow import Flow, Times, counted, squared_error

SCALES = ("sample", "batch", "none")


@dataclass(frozen=True)
class Dmd:
    """DMD2 (Yin et al., arXiv 2405.14867; DMD: arXiv 2311.18828).

    - `times`: at which the two are compared; published recipes take a shift of 5 or 8.
    - `scale`: the direction is divided by the mean absolute distance of a sample from what the teacher predicts for it,
      in the "sample" or in the "batch", so that all times weigh alike; "none" leaves it.

    ValueError for another scale.
    """

    times: Times = field(default_factory=lambda: Times(shift=5.0, low=0.02, high=0.98))
    scale: Literal["sample", "batch", "none"] = "sample"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"dmd: scale={self.scale!r} is not one of {', '.join(SCALES)}")

    def loss(
        self,
        x: Tensor,
        teacher: Velocity,
        critic: Velocity,
        *,
        ids_N: Tensor,
        key: Tensor,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
    ) -> Mean:
        """Half the mean square of the direction g, whose gradient by the samples is g over the count of numbers.

        Args:
            x: samples of the student `[N, ...]`, differentiable: the gradient by its parameters is the vector-Jacobian
                product of its rollout with g.
            teacher: with guidance, if it is to be learnt as well; it and the critic get no gradient.
            ids_N: int64, the sample of each row. `key`: int64 `[2]`, of the step.
            given_N, valid_N: as in `Flow.loss`.

        ValueError as `Flow.loss`, and for scale="sample" on a mesh whose ranks share samples.
        """
        g = self.direction(x.detach(), teacher, critic, ids_N=ids_N, key=key, given_N=given_N, valid_N=valid_N)
        wide = torch.promote_types(x.dtype, torch.float32)
        pulled = squared_error(x.to(wide), (x.to(wide) - g).detach(), counted(given_N, valid_N))
        return Mean(pulled.total / 2, pulled.count)

    def direction(
        self,
        x: Tensor,
        teacher: Velocity,
        critic: Velocity,
        *,
        ids_N: Tensor,
        key: Tensor,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
    ) -> Tensor:
        """g, `[N, ...]` in at least float32: what the critic predicts less what the teacher predicts, scaled.

        Unscaled and at time t it is `t ** 2 / (1 - t)` times the difference of the scores, the critic's less the
        teacher's, signs as of a loss: samples go against it. Arguments and errors are those of `loss`, with `x` `[N,
        ...]`.
        """
        with torch.no_grad():
            noisy = Flow(self.times).noisy(x, ids_N=ids_N, key=key, given_N=given_N, valid_N=valid_N)
            wide = noisy.target.dtype
            real = clean(noisy.x, noisy.time_N, teacher(noisy.x, noisy.time_N)).to(wide)
            own = clean(noisy.x, noisy.time_N, critic(noisy.x, noisy.time_N)).to(wide)
            return (own - real) / self._size(x.to(wide) - real, ids_N, noisy.counted_N)

    def _size(self, distance: Tensor, ids_N: Tensor, counted_N: Tensor | None) -> Tensor | float:
        if self.scale == "none":
            return 1.0
        far_N = distance.abs().flatten(1).mean(1)
        one_N = torch.ones_like(far_N) if counted_N is None else counted_N.to(far_N.dtype)
        far_N = torch.where(one_N > 0, far_N, 0)
        if self.scale == "batch":
            size_N = sum_over_batch(far_N.sum()) / sum_over_batch(one_N.sum())
        else:
            first_N = first_tokens(ids_N)
            size_N = sum_by_run(far_N, first_N) / sum_by_run(one_N, first_N).clamp(min=1)
        size_N = size_N.clamp(min=torch.finfo(far_N.dtype).tiny)
        return size_N if self.scale == "batch" else size_N.view(-1, *[1] * (distance.dim() - 1))

    def critic_loss(
        self,
        critic: Velocity,
        x: Tensor,
        *,
        ids_N: Tensor,
        key: Tensor,
        given_N: Tensor | None = None,
        valid_N: Tensor | None = None,
    ) -> Mean:
        """Flow matching of the student's samples `x` `[N, ...]`, which get no gradient, at the times of the comparison.

        Arguments and errors are those of `loss`.
        """
        return Flow(self.times).loss(critic, x.detach(), ids_N=ids_N, key=key, given_N=given_N, valid_N=valid_N)
