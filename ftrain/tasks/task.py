"""What a training task is: a pure loss of a model's batch, as frozen options with one method."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ftrain.kernels.mean import Mean
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree


class Task(Protocol):
    """Options of a task, and its loss; sft, dpo and others each are one.

    `loss(model, params, batch, key=None)` gives what is differentiated, a `Mean` or `WeightedSum`, and terms for the
    log, `Mean`s by name. `compares`: it takes `reference=` too, a tree of parameters that gets no gradient.
    """

    compares: ClassVar[bool]

    def loss(
        self, model: Model, params: Tree, batch: Mapping[str, Any], *, key: Tensor | None = None
    ) -> tuple[Any, dict[str, Mean]]:
        """The loss and its terms. ValueError for a batch or a model that the task cannot take."""
        ...


def require_token_losses(task: str, model: Model) -> None:
    """ValueError for a model that has no loss of each token."""
    if model.token_losses is None:
        raise ValueError(
            f"{task} needs the loss of each token, and {model.name} gives none: it is for language models "
            '(ftrain.hf.open(folder), task="causal_lm")'
        )


def require_leaf(task: str, batch: Mapping[str, Any], leaf: str, means: str) -> Tensor:
    """A leaf of the batch, with its dims folded into one. ValueError, saying what it `means`, where it is not there."""
    if leaf not in batch:
        raise ValueError(f"{task}: the batch has {', '.join(sorted(batch))} and no {leaf!r}, {means}")
    found: Tensor = batch[leaf]
    return found.flatten()


def without(batch: Mapping[str, Any], leaf: str) -> dict[str, Any]:
    """The batch that the model reads: all but a leaf of the task's own."""
    return {name: value for name, value in batch.items() if name != leaf}


def for_log(mean: Mean) -> Mean:
    """The same mean without its gradient."""
    return Mean(mean.total.detach(), mean.count)
