"""Embeddings of texts: a question lies near the text that answers it, and far from all others of the batch.

A pack holds for each row its question, the text that answers it, and texts that do not. What a text is, its embedding,
is the mean of what the model knows at its tokens, or what it knows at the last one, of length one.

Legend: T tokens of the batch, D model width, N documents that a rank's batch has room for, M that the whole batch has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ftrain.kernels.documents import Documents
from ftrain.kernels.mean import Mean
from ftrain.kernels.whole_batch import whole_rows, within_documents
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree
from ftrain.tasks.document_sums import document_ids, first_tokens
from ftrain.tasks.task import for_log, require_leaf, without

QUERY, POSITIVE, NEGATIVE = 1, 2, 3
"""Values of the leaf `part`: of a question's tokens, of its answer's, and of another text's."""


@dataclass(frozen=True)
class Embed:
    """InfoNCE (van den Oord et al., arXiv 1807.03748) over all texts of the batch, those of other ranks included.

    - `temperature`: divides the cosines.
    - `pooling`: "mean" of a text's tokens, or "last" of them.
    """

    temperature: float = 0.05
    pooling: Literal["mean", "last"] = "mean"
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"embed: temperature={self.temperature} must be positive")
        if self.pooling not in ("mean", "last"):
            raise ValueError(f"embed: pooling={self.pooling!r} is not 'mean' or 'last'")

    def loss(
        self, model: Model, params: Tree, batch: Mapping[str, Any], *, key: Tensor | None = None
    ) -> tuple[Any, dict[str, Mean]]:
        """The mean over questions of the cross entropy of their answer among all texts of the batch, and `accuracy`.

        Args:
            model, params: what is trained.
            batch: of the model's leaves, `segments` as `Documents`, and `part`, int64 of the tokens' shape: 1 for the
                tokens of a question, 2 for those of its answer right behind it, 3 for other texts, 0 elsewhere.
            key: int64 `[2]`, for dropout.

        ValueError for a batch without them, for a model that does not show what its head reads, and on a mesh whose
        ranks share documents.
        """
        part_T = require_leaf("embed", batch, "part", "which says what is a question (1), its answer (2), a text (3)")
        texts = without(batch, "part")
        if model.hidden is None:
            raise ValueError(f"embed: {model.name} does not show what its head reads")
        if not isinstance(texts.get("segments"), Documents):
            raise ValueError("embed: give the batch's segments as Documents, whose number of documents is bounded")
        hidden_TD = model.hidden(params, texts, key).flatten(0, -2)
        pooled_ND, part_N = self._pooled(hidden_TD, part_T, document_ids(texts), len(texts["segments"].offsets_N) - 1)
        all_MD, part_M = whole_rows(pooled_ND), whole_rows(part_N)
        text_M = (part_M == POSITIVE) | (part_M == NEGATIVE)
        scores_MM = (all_MD @ all_MD.T / self.temperature).masked_fill(~text_M, torch.finfo(all_MD.dtype).min)
        next_M = (torch.arange(len(part_M), device=part_M.device) + 1).clamp(max=len(part_M) - 1)
        loss_M = -torch.log_softmax(scores_MM, -1).gather(1, next_M[:, None])[:, 0]  # an answer follows its question
        right_M = scores_MM.argmax(-1) == next_M
        asked_M = part_M == QUERY
        count = asked_M.sum().to(loss_M.dtype)
        accuracy = Mean((asked_M & right_M).sum().to(loss_M.dtype), count)
        return Mean(torch.where(asked_M, loss_M, 0).sum(), count), {"accuracy": for_log(accuracy)}

    def _pooled(self, hidden_TD: Tensor, part_T: Tensor, ids_T: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """The embedding of each document, `[N, D]` of length one, and its part, int64 `[N]`."""
        with within_documents():
            first_T = first_tokens(ids_T)
            run_T = (first_T.long().cumsum(0) - 1).clamp(0, room - 1)
            wide_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
            if self.pooling == "last":
                last_T = torch.cat([first_T[1:], first_T.new_ones(1)])
                wide_TD = torch.where(last_T[:, None], wide_TD, 0)
            sums_ND = wide_TD.new_zeros(room, wide_TD.shape[1]).index_add(0, run_T, wide_TD)
            part_N = part_T.new_zeros(room).index_add(0, run_T, torch.where(first_T, part_T, 0))
            return torch.nn.functional.normalize(sums_ND, dim=-1), part_N
