"""Packs put together: one after the other for the data ranks of a step, or in a new first dim for micro-batches.

T tokens of a pack, P packs, M micro-batches.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.documents import Documents, join_documents, stack_documents


def join_packs(packs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of P packs, one after the other: leaves `[T, ...]` become `[P * T, ...]`, `Documents` those of all.

    Ids of documents (`Documents`) stay apart; other leaves are put together as they are. ValueError where packs differ
    in their leaves or their tokens.

    >>> join_packs([{"tokens": torch.tensor([1, 2])}, {"tokens": torch.tensor([3, 4])}])["tokens"].tolist()
    [1, 2, 3, 4]
    """
    return _put_together(packs, torch.cat, join_documents)


def stack_packs(packs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of M micro-batches for `ftrain.accumulate`: leaves `[T, ...]` become `[M, T, ...]`.

    ValueError where micro-batches differ in their leaves or their shapes.

    >>> stack_packs([{"tokens": torch.tensor([1, 2])}, {"tokens": torch.tensor([3, 4])}])["tokens"].tolist()
    [[1, 2], [3, 4]]
    """
    return _put_together(packs, torch.stack, stack_documents)


def _put_together(
    packs: Sequence[Mapping[str, Any]],
    tensors: Callable[[list[Tensor]], Tensor],
    documents: Callable[[list[Documents]], Documents],
) -> dict[str, Any]:
    if not packs:
        raise ValueError("no packs to put together")
    names = list(packs[0])
    for i, pack in enumerate(packs):
        if set(pack) != set(names):
            raise ValueError(f"pack {i} has leaves {sorted(pack)}, and pack 0 {sorted(names)}")
    made: dict[str, Any] = {}
    for name in names:
        parts = [pack[name] for pack in packs]
        shapes = {tuple((p.ids_T if isinstance(p, Documents) else p).shape) for p in parts}
        if len(shapes) > 1:
            raise ValueError(f"leaf {name!r} has shapes {sorted(shapes)} in different packs: give all one budget")
        made[name] = documents(parts) if isinstance(parts[0], Documents) else tensors(parts)
    return made
