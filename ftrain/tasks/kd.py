"""A student that learns the distributions of a teacher at every token that has a label.

Legend: T tokens of the batch, V vocabulary, k likeliest tokens of the teacher.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ftrain.kernels.mean import Mean, weighted_sum
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree
from ftrain.tasks.task import for_log

KINDS = ("forward", "reverse", "jsd")


@dataclass(frozen=True)
class Kd:
    """Distillation of knowledge (Hinton et al., arXiv 1503.02531).

    - `kind`: "forward" is KL(teacher, student), which covers all that the teacher may say; "reverse" is KL(student,
      teacher), which keeps to its likeliest (Gu et al., arXiv 2306.08543); "jsd" lies between (Agarwal et al., arXiv
      2306.13649).
    - `mix`: for "jsd", the weight of the teacher in the mixture.
    - `temperature`: divides both scores; the loss is multiplied by its square, which keeps gradients as large.
    - `top_k`: compare on the teacher's likeliest tokens, and on all others as one; None: on the whole vocabulary.
    - `labels`: weight of the cross entropy of the labels beside it.
    """

    compares: ClassVar[bool] = True

    kind: Literal["forward", "reverse", "jsd"] = "forward"
    mix: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    labels: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kd: kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if not self.temperature > 0:
            raise ValueError(f"kd: temperature={self.temperature} must be positive")
        if not 0 < self.mix < 1:
            raise ValueError(f"kd: mix={self.mix} must lie between 0 and 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"kd: top_k={self.top_k} must be at least 1, or None")
        if self.labels < 0:
            raise ValueError(f"kd: labels={self.labels} must not be negative")

    def loss(
        self,
        model: Model,
        params: Tree,
        batch: Mapping[str, Any],
        *,
        reference: Tree,
        teacher: Model | None = None,
        key: Tensor | None = None,
    ) -> tuple[Any, dict[str, Mean]]:
        """The mean over the tokens that have a label, and `labels`, their cross entropy, where it is asked for.

        Args:
            model, params: the student.
            batch: of the model's leaves, with `labels`.
            reference: the teacher's parameters, which get no gradient.
            teacher: its model; None: that of the student.
            key: int64 `[2]`, for dropout of the student.

        ValueError where the two have other vocabularies, or either gives no scores.
        """
        teacher = teacher or model
        for who in (model, teacher):
            if who.logits is None:
                raise ValueError(f"kd: {who.name} gives no scores of tokens")
        with torch.no_grad():
            theirs_TV = teacher.logits(reference, batch).flatten(0, -2).detach()  # type: ignore[misc]
        ours_TV = model.logits(params, batch, key).flatten(0, -2)  # type: ignore[misc]
        if theirs_TV.shape != ours_TV.shape:
            raise ValueError(
                f"kd: {teacher.name} scores {theirs_TV.shape[-1]} tokens and {model.name} {ours_TV.shape[-1]}: a "
                "student has its teacher's vocabulary"
            )
        labelled_T = batch["labels"].flatten() != -100
        divergence_T = self.divergence(theirs_TV, ours_TV)
        count = labelled_T.sum().to(divergence_T.dtype)
        loss = Mean(torch.where(labelled_T, divergence_T, 0).sum(), count)
        if not self.labels:
            return loss, {}
        logp_TV = log_softmax(ours_TV.to(divergence_T.dtype), -1)
        chosen_T = logp_TV.gather(-1, torch.where(labelled_T, batch["labels"].flatten(), 0)[:, None])[:, 0]
        spoken = Mean(torch.where(labelled_T, -chosen_T, 0).sum(), count)
        return weighted_sum({"kd": loss, "labels": spoken}, {"labels": self.labels}), {"labels": for_log(spoken)}

    def divergence(self, theirs_TV: Tensor, ours_TV: Tensor) -> Tensor:
        """The divergence of each token, `[T]` in nats, in at least float32."""
        wide = torch.promote_types(ours_TV.dtype, torch.float32)
        p_TV = log_softmax(theirs_TV.to(wide) / self.temperature, -1)
        q_TV = log_softmax(ours_TV.to(wide) / self.temperature, -1)
        if self.top_k is not None and self.top_k < p_TV.shape[-1] - 1:
            index_Tk = p_TV.topk(self.top_k, -1).indices
            p_TV, q_TV = _with_rest(p_TV.gather(-1, index_Tk)), _with_rest(q_TV.gather(-1, index_Tk))
        return self._of_logs(p_TV, q_TV) * self.temperature**2

    def _of_logs(self, p_TV: Tensor, q_TV: Tensor) -> Tensor:
        if self.kind == "forward":
            return _kl(p_TV, q_TV)
        if self.kind == "reverse":
            return _kl(q_TV, p_TV)
        mixed_TV = torch.logaddexp(p_TV + math.log(self.mix), q_TV + math.log(1 - self.mix))
        return self.mix * _kl(p_TV, mixed_TV) + (1 - self.mix) * _kl(q_TV, mixed_TV)


def _kl(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """KL(p, q) of logs of probabilities, `[T]`."""
    return (p_TV.exp() * (p_TV - q_TV)).sum(-1)


def _with_rest(logp_Tk: Tensor) -> Tensor:
    """The same and, as one more entry, the log of the probability that remains, `[T, k + 1]`."""
    left_T1 = (1 - logp_Tk.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(logp_Tk.dtype).tiny)
    return torch.cat([logp_Tk, left_T1.log()], -1)
