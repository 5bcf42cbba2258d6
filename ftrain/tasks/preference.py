"""Preferences: an answer that was chosen beside one that was rejected, without a reward model.

A pack holds pairs of documents, the chosen one first; `side` tells them apart. What the policy has learnt is measured
against a reference, which is another tree of the same model: with LoRA, the base without the adapter.

Legend: T tokens of the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ftrain.kernels.mean import Mean, mean_where, weighted_sum
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree
from ftrain.tasks.document_sums import document_ids, first_tokens, sum_by_run
from ftrain.tasks.shared_prompts import sharing
from ftrain.tasks.task import for_log, require_leaf, require_token_losses, without

KINDS = ("sigmoid", "ipo", "hinge")


@dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation.

    - `beta`: how far the policy may go from the reference: large values hold it close.
    - `kind`: "sigmoid" (Rafailov et al., arXiv 2305.18290), "ipo" (a square about `1 / (2 beta)`, of means over the
      tokens of an answer; Azar et al., arXiv 2310.12036) or "hinge" (Zhao et al., arXiv 2305.10425).
    - `label_smoothing`: the share of pairs that are thought to be the wrong way round, for "sigmoid" (Mitchell's
      conservative DPO).
    - `sft`: weight of the cross entropy of the chosen answers, over their tokens, beside the loss of preferences.
    """

    compares: ClassVar[bool] = True

    beta: float = 0.1
    kind: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: float = 0.0
    sft: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"dpo: kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if not self.beta > 0:
            raise ValueError(f"dpo: beta={self.beta} must be positive")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"dpo: label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        if self.label_smoothing and self.kind != "sigmoid":
            raise ValueError(f"dpo: label_smoothing is for kind='sigmoid', not {self.kind!r}")
        if self.sft < 0:
            raise ValueError(f"dpo: sft={self.sft} must not be negative")

    def loss(
        self, model: Model, params: Tree, batch: Mapping[str, Any], *, reference: Tree, key: Tensor | None = None
    ) -> tuple[Any, dict[str, Mean]]:
        """The mean over pairs, and terms: `accuracy` (pairs whose chosen answer has the higher reward), `margin` (of
        rewards), `chosen` and `rejected` (rewards: `beta` times the log of the ratio to the reference, in nats).

        Args:
            model, params: of the policy.
            batch: of the model's leaves, and `side`, int64 of the tokens' shape: 1 for the tokens of a chosen
                document, -1 for those of the rejected one right behind it, 0 elsewhere; and `prefix`, if the two share
                their beginning (`ftrain.tasks.shared_prompts`).
            reference: parameters of the reference, which get no gradient.
            key: int64 `[2]`, for dropout of the policy.

        ValueError for a batch without `side`, for a model that has no losses of tokens, and on a mesh whose ranks share
        documents.
        """
        side_T = require_leaf("dpo", batch, "side", "which says what was chosen (1) and what rejected (-1)")
        require_token_losses("dpo", model)
        with sharing(without(batch, "side")) as texts:
            with torch.no_grad():
                reference_T = model.token_losses(reference, texts).flatten()  # type: ignore[misc]
            policy_T = model.token_losses(params, texts, key).flatten()  # type: ignore[misc]
        ratio_T = reference_T.detach() - policy_T  # the log of the ratio of probabilities
        first_T = first_tokens(document_ids(texts))
        pair_T = first_T & (side_T == 1)
        if self.kind == "ipo":
            labelled_T = (batch["labels"].flatten() != -100).to(ratio_T.dtype)
            ratio_T = ratio_T / sum_by_run(labelled_T, first_T).clamp(min=1)
        reward_T = sum_by_run(ratio_T * (side_T == 1), pair_T), sum_by_run(ratio_T * (side_T == -1), pair_T)
        margin_T = reward_T[0] - reward_T[1]
        loss = mean_where(self._of_margin(margin_T), pair_T)
        terms = {
            "accuracy": mean_where((margin_T > 0).to(margin_T.dtype), pair_T),
            "margin": mean_where(self.beta * margin_T, pair_T),
            "chosen": mean_where(self.beta * reward_T[0], pair_T),
            "rejected": mean_where(self.beta * reward_T[1], pair_T),
        }
        terms = {name: for_log(mean) for name, mean in terms.items()}
        if not self.sft:
            return loss, terms
        chosen_T = (side_T == 1) & (batch["labels"].flatten() != -100)
        spoken = mean_where(policy_T, chosen_T)
        both = weighted_sum({"dpo": loss, "sft": spoken}, {"sft": self.sft})
        return both, {**terms, "sft": for_log(spoken)}

    def _of_margin(self, margin_T: Tensor) -> Tensor:
        if self.kind == "ipo":
            return (margin_T - 1 / (2 * self.beta)).square()
        if self.kind == "hinge":
            return torch.relu(1 - self.beta * margin_T)
        right_T, wrong_T = -logsigmoid(self.beta * margin_T), -logsigmoid(-self.beta * margin_T)
        return (1 - self.label_smoothing) * right_T + self.label_smoothing * wrong_T
