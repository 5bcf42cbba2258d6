"""Next tokens: of whole texts (pretraining) and of an assistant's turns (supervised fine-tuning). The loss is the same;
which tokens have labels is decided where documents are made.

Legend: T tokens of the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ftrain.kernels.mean import Mean, WeightedSum
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree
from ftrain.tasks.document_sums import document_ids, first_tokens, sum_by_run
from ftrain.tasks.task import require_leaf, require_token_losses, without

AVERAGES = ("tokens", "documents")


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of the labels.

    - `average`: "tokens" weighs all labels alike; "documents" weighs all documents alike, however many labels each has.
    - `weighted`: labels are weighed by the batch's leaf `weights`, floating, of the tokens' shape.
    """

    compares: ClassVar[bool] = False

    average: Literal["tokens", "documents"] = "tokens"
    weighted: bool = False

    def __post_init__(self) -> None:
        if self.average not in AVERAGES:
            raise ValueError(f"average={self.average!r} is not one of {', '.join(AVERAGES)}")
        if self.weighted and self.average == "documents":
            raise ValueError("weights of labels and average='documents' say two things: choose one")

    @property
    def gives_state(self) -> bool:
        """Whether the loss of a model with state gives the new one."""
        return self.average == "tokens" and not self.weighted

    def loss(
        self,
        model: Model,
        params: Tree,
        batch: Mapping[str, Any],
        *,
        key: Tensor | None = None,
        state: Tree | None = None,
    ) -> tuple[Any, dict[str, Mean]]:
        """The mean over the labels of the batch, and no terms but those that the model names.

        Args:
            model, params: what is trained.
            batch: of the model's leaves, with `labels`; `weights` where they are asked for.
            key: int64 `[2]`, for dropout.
            state: of a model that has one; None: its own, which stays. In the place of the mean there is then a pair of
                it and the new state, or for a model that is `rebalanced` what its routers did.

        ValueError for a batch without them, and with weights or "documents" for a model without losses of tokens.
        """
        if self.gives_state:
            if state is not None:
                changed = model.loss if model.rebalanced is None else model.routed
                return changed(params, batch, key, state=state), {}  # type: ignore[misc]
            found = model.loss(params, batch, key)
            found = found[0] if model.state else found
            named = isinstance(found, WeightedSum) and len(model.terms) == len(found.terms)
            return found, dict(zip(model.terms, found.terms, strict=True)) if named else {}
        require_token_losses("next tokens by weights or documents", model)
        losses_T = model.token_losses(params, without(batch, "weights") if self.weighted else batch, key).flatten()  # type: ignore[misc]
        labelled_T = (batch["labels"].flatten() != -100).to(losses_T.dtype)
        if self.weighted:
            weights_T = require_leaf("sft", batch, "weights", "which weighs its labels").to(losses_T.dtype).detach()
            weights_T = weights_T * labelled_T
            return Mean((losses_T * weights_T).sum(), weights_T.sum()), {}
        first_T = first_tokens(document_ids(batch))
        labels_T, total_T = sum_by_run(labelled_T, first_T), sum_by_run(losses_T, first_T)
        counted_T = first_T & (labels_T > 0)
        mean_T = torch.where(counted_T, total_T / labels_T.clamp(min=1), 0)
        return Mean(mean_T.sum(), counted_T.sum().to(mean_T.dtype)), {}
