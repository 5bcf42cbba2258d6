"""An adversary beside distribution matching: a head on a network's features tells real samples from the student's.

Real and made samples get the same times and noise before they are judged ("diffusion GAN"); logits are one of a sample.

Legend: N rows, B samples, D width of features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, softplus

from ftrain.kernels.mean import Mean
from ftrain.modules.spec import Normal, ParamSpec, zeros
from ftrain.tasks.document_sums import first_tokens, sum_by_run


def head_specs(width: int) -> dict[str, ParamSpec]:
    """A linear map `[D]` of normed features to a logit, which starts at almost nothing."""
    return {"w_D": ParamSpec((width,), ("embed",), Normal(1e-2 / width**0.5)), "b": ParamSpec((1,), (None,), zeros())}


def head_logits(params: Any, features_ND: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """A logit for each row, `[N]`: that of its sample (int64 `ids_N`), of its mean features; and bool `[N]`, True for
    the first row of each sample, which alone is to count.

    ValueError on a mesh whose ranks share samples.
    """
    normed_ND = layer_norm(features_ND, features_ND.shape[-1:])
    each_N = normed_ND @ params["w_D"] + params["b"]
    first_N = first_tokens(ids_N)
    return sum_by_run(each_N, first_N) / sum_by_run(torch.ones_like(each_N), first_N), first_N


@dataclass(frozen=True)
class Gan:
    """Non-saturating losses (Goodfellow et al., arXiv 1406.2661).

    - `penalty`: weight of the squared difference of logits of real samples and of the same under a little noise, in the
      place of a gradient penalty (Lin et al., arXiv 2501.08316).

    ValueError for a negative penalty.
    """

    penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.penalty < 0:
            raise ValueError(f"gan: penalty={self.penalty} must not be negative")

    def student_loss(self, made_N: Tensor, counted_N: Tensor | None = None) -> Mean:
        """The mean of `softplus(-logit)` of the student's samples; it is differentiated by them."""
        return _mean(softplus(-made_N), counted_N)

    def head_loss(
        self,
        real_N: Tensor,
        made_N: Tensor,
        counted_N: Tensor | None = None,
        *,
        perturbed_N: Tensor | None = None,
    ) -> Mean:
        """The mean of `softplus(-real) + softplus(made)`, and the penalty, whose logits are `perturbed_N`.

        ValueError for a penalty without them.
        """
        each_N = softplus(-real_N) + softplus(made_N)
        if self.penalty:
            if perturbed_N is None:
                raise ValueError(f"gan: penalty={self.penalty} needs perturbed_N, logits of real samples with noise")
            each_N = each_N + self.penalty * (real_N - perturbed_N).square()
        return _mean(each_N, counted_N)


def _mean(each_N: Tensor, counted_N: Tensor | None) -> Mean:
    if counted_N is None:
        return Mean.of(each_N)
    return Mean(torch.where(counted_N, each_N, 0).sum(), counted_N.sum().to(each_N.dtype))
