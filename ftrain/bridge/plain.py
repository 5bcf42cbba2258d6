"""A module by itself, eager, in float64: a language model of transformers one document after the other, or any."""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ftrain.bridge.batches import IGNORED, rows
from ftrain.bridge.draws import drawing
from ftrain.bridge.modes import running
from ftrain.bridge.skeleton import flatten, parameters
from ftrain.kernels.documents import ids_of
from ftrain.kernels.mean import Mean
from ftrain.modules.spec import Tree, map_with_paths


def plain_loss(
    make: Callable[[], nn.Module], stored: Mapping[str, Tensor], params: Tree, batch: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean cross entropy of the batch's labels, 0-d, and its gradients by name, in float64.

    `make()`: a module of transformers with memory, with its own attention. Its parameters are overwritten by `params`,
    what it has beside them by `stored`. Nothing is dropped.
    """
    module = make().double().eval()
    with torch.no_grad():
        own = dict(module.named_parameters())
        for name, x in flatten(params).items():
            own[name].copy_(x)
        beside = {**dict(module.named_buffers()), **own}
        for name, x in stored.items():
            beside[name].copy_(x)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens_L, labels_L in _documents(batch):
        logits = module(input_ids=tokens_L[None]).logits[0]
        total = total + nn.functional.cross_entropy(logits, labels_L, ignore_index=IGNORED, reduction="sum")
        count += int((labels_L != IGNORED).sum())
    loss = total / max(count, 1)
    loss.backward()
    zeros = {name: torch.zeros_like(p) for name, p in own.items()}
    return loss.detach(), {name: zeros[name] if p.grad is None else p.grad for name, p in own.items()}


def _documents(batch: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens and labels of each document."""
    tokens, labels, segments = rows(batch["tokens"]), rows(batch["labels"]), batch.get("segments")
    for row in range(len(tokens)):
        ids = torch.zeros_like(tokens[row]) if segments is None else ids_of(segments).reshape(tokens.shape)[row]
        starts = [0, *(torch.nonzero(ids.diff()).flatten() + 1).tolist(), len(ids)]
        for start, end in pairwise(starts):
            yield tokens[row, start:end], labels[row, start:end]


def plain_loss_of(
    module: nn.Module, loss: Callable[[nn.Module, Any], Mean], params: Tree, batch: Any, *, as_it_is: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a module by itself, 0-d, and its gradients by name, in float64. Nothing is dropped.

    `module`: has memory; its parameters are overwritten. `as_it_is`: in the mode in which it is, not by `running`.
    """
    module = module.double()
    own = parameters(module)
    with torch.no_grad():
        for name, x in flatten(params).items():
            own[name].copy_(x)
    with drawing(None) if as_it_is else running(module, drawing=False):
        value = loss(module, batch).value()
    value.backward()
    return value.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.items()}


def widened(tree: Tree) -> Tree:
    """The tree with its floating leaves in float64."""
    return map_with_paths(lambda _, x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree)
