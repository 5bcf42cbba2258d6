"""Answers that were judged one by one, good or bad, without a partner (Ethayarajh et al., arXiv 2402.01306).

What the policy has learnt is measured against a reference, and against how far it has moved on answers to other
questions (the divergence), which is a mean over the whole batch.

Legend: T tokens of the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ftrain.kernels.mean import Mean, mean_where
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree
from ftrain.tasks.document_sums import document_ids, first_tokens, sum_by_run
from ftrain.tasks.shared_prompts import sharing
from ftrain.tasks.task import for_log, require_leaf, require_token_losses, without

GOOD, BAD, OTHER = 1, -1, 2
"""Values of the leaf `judged`: of a good answer's tokens, of a bad one's, and of an answer to another question."""


@dataclass(frozen=True)
class Kto:
    """Kahneman-Tversky optimisation.

    - `beta`: how far the policy may go from the reference: large values hold it close.
    - `good`, `bad`: weights of the two kinds of answers, for data that has more of one.
    """

    compares: ClassVar[bool] = True

    beta: float = 0.1
    good: float = 1.0
    bad: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"kto: beta={self.beta} must be positive")
        if self.good < 0 or self.bad < 0:
            raise ValueError(f"kto: the weights good={self.good} and bad={self.bad} must not be negative")

    def loss(
        self, model: Model, params: Tree, batch: Mapping[str, Any], *, reference: Tree, key: Tensor | None = None
    ) -> tuple[Any, dict[str, Mean]]:
        """The mean over judged answers, and terms: `kl` (the divergence, in nats), `good` and `bad` (rewards).

        Args:
            model, params: of the policy.
            batch: of the model's leaves, and `judged`, int64 of the tokens' shape: 1 for the tokens of a good document,
                -1 for a bad one's, 2 for an answer to another question than its own, 0 elsewhere; and `prefix`, if
                documents share their beginnings (`ftrain.tasks.shared_prompts`).
            reference: parameters of the reference, which get no gradient.
            key: int64 `[2]`, for dropout of the policy.

        ValueError for a batch without `judged`, for a model that has no losses of tokens, and on a mesh whose ranks
        share documents.
        """
        judged_T = require_leaf("kto", batch, "judged", "which says what is good (1), bad (-1), another's answer (2)")
        require_token_losses("kto", model)
        with sharing(without(batch, "judged")) as texts:
            with torch.no_grad():
                reference_T = model.token_losses(reference, texts).flatten()  # type: ignore[misc]
            policy_T = model.token_losses(params, texts, key).flatten()  # type: ignore[misc]
        first_T = first_tokens(document_ids(texts))
        ratio_T = sum_by_run(reference_T.detach() - policy_T, first_T)
        good_T, bad_T, other_T = (first_T & (judged_T == kind) for kind in (GOOD, BAD, OTHER))
        divergence = mean_where(ratio_T.detach(), other_T)
        kl = divergence.value().clamp(min=0)
        good = 1 - torch.sigmoid(self.beta * (ratio_T - kl))
        bad = 1 - torch.sigmoid(self.beta * (kl - ratio_T))
        loss_T = torch.where(good_T, self.good * good, torch.where(bad_T, self.bad * bad, 0))
        rewards = self.beta * ratio_T.detach()
        terms = {"kl": divergence, "good": mean_where(rewards, good_T), "bad": mean_where(rewards, bad_T)}
        return mean_where(loss_T, good_T | bad_T), {name: for_log(term) for name, term in terms.items()}
