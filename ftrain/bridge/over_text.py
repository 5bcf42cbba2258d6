"""What models have in common whose decoder lies at `text` in their parameters and whose stream others make with it.

Legend: T tokens of a pack, B rows, L tokens of a row, V vocabulary, D model width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ftrain.kernels.mean import Mean
from ftrain.modules import decoder
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.spec import Tree


class OverText(ABC):
    """The functions of a `Model` that read its decoder's hidden states. They drop nothing, so a key makes no
    difference.
    """

    @property
    @abstractmethod
    def text(self) -> DecoderConfig:
        """The decoder."""

    @abstractmethod
    def states(self, params: Tree, batch: Mapping[str, Any]) -> Tensor:
        """What the head reads of the folded tokens, `[T, D]`. ValueError for a batch that does not fit."""

    def mean(self, params: Tree, states_TD: Tensor, labels: Tensor) -> Mean:
        """The cross entropy of the labels, int64 `[T]` or `[B, L]`, of what `states` gives."""
        return decoder.loss(params["text"], states_TD, labels.flatten(), self.text)

    def token_losses(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """The cross entropy of each label, `[T]` or `[B, L]`, 0 where there is none. ValueError for a batch that does
        not fit.
        """
        del key
        states_TD, labels_T = self.states(params, batch), batch["labels"].flatten()
        losses_T = decoder.token_losses(params["text"], states_TD, labels_T, self.text)
        return losses_T.unflatten(0, batch["tokens"].shape)

    def logits(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """The scores of text `[T, V]` or `[B, L, V]`. ValueError for a batch that does not fit."""
        del key
        scores_TV = decoder.logits(params["text"], self.states(params, batch), self.text)
        return scores_TV.unflatten(0, batch["tokens"].shape)

    def hidden(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """What the head reads, `[T, D]` or `[B, L, D]`. ValueError for a batch that does not fit."""
        del key
        return self.states(params, batch).unflatten(0, batch["tokens"].shape)
