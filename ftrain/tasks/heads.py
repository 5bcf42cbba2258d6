"""Heads upon a language model, which read what it knows at the last token of each document: classes and rewards.

Legend: T tokens of the batch, D model width, C outputs of the head.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ftrain.kernels.mean import Mean, mean_where, weighted_sum
from ftrain.kernels.whole_batch import within_documents
from ftrain.modules.model import Model
from ftrain.modules.spec import Normal, ParamSpec, Tree, leaves_with_paths
from ftrain.tasks.document_sums import document_ids, first_tokens, sum_by_run
from ftrain.tasks.shared_prompts import sharing
from ftrain.tasks.task import for_log, require_leaf, without

HEAD = "task_head"
"""The head's name in a state's parameters."""


@dataclass(frozen=True)
class Headed(ABC):
    """What tasks with a head have in common. `outputs`: C, of the head."""

    compares: ClassVar[bool] = False

    @property
    @abstractmethod
    def outputs(self) -> int:
        """C, how many numbers the head gives."""

    def head_specs(self, model: Model) -> Tree:
        """The `ParamSpec` of the head, `[D, C]`. ValueError for a model that does not show what its own head reads."""
        if model.hidden is None:
            raise ValueError(f"{model.name} does not show what its head reads, so no other head can read it")
        width = width_of(model)
        return {HEAD: ParamSpec((width, self.outputs), ("embed", None), Normal(1 / width))}


def width_of(model: Model) -> int:
    """D, from the model's table of tokens. ValueError for a model without one."""
    for _, spec in leaves_with_paths(model.specs):
        if len(spec.shape) == 2 and "vocab" in spec.axes:
            return int(spec.shape[1 - spec.axes.index("vocab")])
    raise ValueError(f"{model.name} has no table of tokens that would tell its width")


def scores(model: Model, params: Tree, head: Tree, batch: Mapping[str, Any], key: Tensor | None) -> Tensor:
    """What the head says at each token, `[T, C]` in at least float32."""
    assert model.hidden is not None
    hidden_TD = model.hidden(params, batch, key).flatten(0, -2)
    found: Tensor = hidden_TD @ head[HEAD].to(hidden_TD.dtype)
    return found.to(torch.promote_types(found.dtype, torch.float32))


def last_tokens(ids_T: Tensor) -> Tensor:
    """Whether a token is the last one of its document, bool `[T]`."""
    with within_documents():
        last_T = torch.ones_like(ids_T, dtype=torch.bool)
        last_T[:-1] = ids_T[1:] != ids_T[:-1]
        return last_T


@dataclass(frozen=True)
class Classify(Headed):
    """Cross entropy of a document's class, told at its last token.

    - `classes`: how many there are; they are numbered from 0.
    """

    classes: int = 2

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"classify: classes={self.classes} must be at least 2")

    @property
    def outputs(self) -> int:
        """C, the classes."""
        return self.classes

    def loss(
        self, model: Model, params: Tree, batch: Mapping[str, Any], *, head: Tree, key: Tensor | None = None
    ) -> tuple[Any, dict[str, Mean]]:
        """The mean over documents, and `accuracy`.

        Args:
            model, params: what the head stands upon.
            batch: of the model's leaves, and `kind`, int64 of the tokens' shape: one more than the class of each
                token's document, 0 for documents without one.
            head: `{"task_head": [D, C]}`.
            key: int64 `[2]`, for dropout.

        ValueError for a batch without `kind`, and on a mesh whose ranks share documents.
        """
        kind_T = require_leaf("classify", batch, "kind", "one more than the class of each document")
        texts = without(batch, "kind")
        scores_TC = scores(model, params, head, texts, key)
        counted_T = last_tokens(document_ids(texts)) & (kind_T > 0)
        class_T = (kind_T - 1).clamp(min=0)
        losses_T = -torch.log_softmax(scores_TC, -1).gather(-1, class_T[:, None])[:, 0]
        right_T = (scores_TC.argmax(-1) == class_T).to(losses_T.dtype)
        return mean_where(losses_T, counted_T), {"accuracy": for_log(mean_where(right_T, counted_T))}


@dataclass(frozen=True)
class Reward(Headed):
    """A reward by which the chosen answer of a pair is above the rejected one (Bradley and Terry).

    - `centre`: weight of the square of the sum of a pair's rewards, which keeps them about zero (Eisenstein et al.,
      arXiv 2312.09244).
    """

    centre: float = 0.0

    def __post_init__(self) -> None:
        if self.centre < 0:
            raise ValueError(f"reward: centre={self.centre} must not be negative")

    @property
    def outputs(self) -> int:
        """C, one."""
        return 1

    def loss(
        self, model: Model, params: Tree, batch: Mapping[str, Any], *, head: Tree, key: Tensor | None = None
    ) -> tuple[Any, dict[str, Mean]]:
        """The mean over pairs, and `accuracy` and `margin` (of the rewards of a pair).

        Args:
            model, params: what the head stands upon.
            batch: of the model's leaves, and `side` and `prefix`, as `Dpo.loss` has them.
            head: `{"task_head": [D, 1]}`.
            key: int64 `[2]`, for dropout.

        ValueError for a batch without `side`, and on a mesh whose ranks share documents.
        """
        side_T = require_leaf("reward", batch, "side", "which says what was chosen (1) and what rejected (-1)")
        with sharing(without(batch, "side")) as texts:
            scores_T = scores(model, params, head, texts, key)[:, 0]
        ids_T = document_ids(texts)
        reward_T = torch.where(last_tokens(ids_T), scores_T, 0)
        pair_T = first_tokens(ids_T) & (side_T == 1)
        margin_T = sum_by_run(reward_T * side_T, pair_T)
        terms = {
            "accuracy": mean_where((margin_T > 0).to(margin_T.dtype), pair_T),
            "margin": mean_where(margin_T, pair_T),
        }
        loss = mean_where(-logsigmoid(margin_T), pair_T)
        logged = {name: for_log(term) for name, term in terms.items()}
        if not self.centre:
            return loss, logged
        both_T = sum_by_run(torch.where(side_T != 0, reward_T, 0), pair_T)
        return weighted_sum(
            {"reward": loss, "centre": mean_where(both_T.square(), pair_T)}, {"centre": self.centre}
        ), logged
