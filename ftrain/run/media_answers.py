"""Answers of models that read media, to prompts that are documents: with the cache of the model where it has one, else
all tokens run again for each new one.

Legend: B prompts, L tokens of a row, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftrain import tree
from ftrain.data.documents import IGNORE, Document, Group
from ftrain.data.layout import Layout, RowLayout, joined
from ftrain.data.packing import Plan, Shape
from ftrain.modules.autoregression import Family
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree, leaves_with_paths


def family_of_documents(model: Model, layout: Layout) -> Family | None:
    """How a model that reads media continues documents with theirs; None for models that read none. `layout`: of its
    batches.
    """
    if model.media is None:
        return None
    if model.family is not None:
        return replace(model.family, prefill=_Prefill(model.family))
    if model.logits is None or not isinstance(layout, RowLayout):
        return None
    found = _Rows(model, layout)
    return Family(found.prefill, found.extend)


@dataclass(frozen=True)
class _Prefill:
    """That of a family whose prompts are raw leaves."""

    family: Family

    def __call__(self, params: Tree, prompts: Sequence[Document], room: int) -> tuple[Tensor, Any]:
        given = [{"tokens": torch.from_numpy(p.tokens), **joined([p.media])} for p in prompts]
        return self.family.prefill(params, given, room)


@dataclass(frozen=True)
class _Rows:
    model: Model
    layout: RowLayout

    def prefill(self, params: Tree, prompts: Sequence[Document], room: int) -> tuple[Tensor, tuple[Document, ...]]:
        """The scores `[B, V]` of the token after each prompt, and the prompts."""
        del room
        return torch.stack([self._scores(params, prompt) for prompt in prompts]), tuple(prompts)

    def extend(self, params: Tree, chosen_B: Tensor, rows: Any) -> tuple[Tensor, tuple[Document, ...]]:
        """The same after one more token of each."""
        longer = [_with(row, token) for row, token in zip(rows, chosen_B.tolist(), strict=True)]
        return self.prefill(params, longer, 0)

    def _scores(self, params: Tree, row: Document) -> Tensor:
        """Scores `[V]` behind the last token of a row, alone in its batch, where nothing is filled up."""
        counts = tuple(int((row.tokens == stream.token).sum()) for stream in self.layout.streams)
        plan = Plan(np.zeros(1, np.int64), np.array([len(row)]), np.ones(1), Shape(len(row), 1, counts))
        batch = self.layout.batch([[Group((row,))]], plan, slots=0, leaves=None)
        device = next(leaf.device for _, leaf in leaves_with_paths(params))
        moved = tree.map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
        scores_V: Tensor = self.model.logits(params, moved)[0, -1].clone()  # type: ignore[misc]
        scores_V[[stream.token for stream in self.layout.streams]] = -torch.inf  # there would be no media for it
        return scores_V


def _with(row: Document, token: int) -> Document:
    return replace(row, tokens=np.append(row.tokens, token), labels=np.append(row.labels, IGNORE), leaves={})
