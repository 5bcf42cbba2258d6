"""A step's batch by its shapes alone, before any row is read: for a search of layouts, and to refuse a layout early."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ftrain.data.documents import Document, Group, lay
from ftrain.data.layout import PackLayout
from ftrain.data.loader import Loader
from ftrain.kernels.documents import Documents
from ftrain.modules.packs import join_packs


def example_batch(
    tokens: int, packs: int, *, leaves: Mapping[str, np.dtype] | None = None, slots: int | None = None
) -> dict[str, Any]:
    """A batch of zeros: `packs` packs of one document of `tokens` tokens each.

    `leaves`: names and dtypes of leaves beside those of language models. `slots`: documents for which a pack has room.

    >>> example_batch(4, 2)["tokens"].shape
    torch.Size([8])
    """
    ids = np.zeros(tokens, np.int64)
    document = Document(ids, ids, {name: np.zeros(tokens, dtype) for name, dtype in (leaves or {}).items()})
    pack: dict[str, Any] = dict(lay([Group((document,))], tokens=tokens))
    pack["segments"] = Documents.of(pack["segments"], max_documents=slots)
    return join_packs([pack] * packs) if packs > 1 else pack


def example_of(loader: Loader) -> dict[str, Any]:
    """A batch of all ranks in the shapes of a loader's steps. Where shapes depend on rows or media, it is the first."""
    layout = loader.layout
    if isinstance(layout, PackLayout) and not layout.streams and layout.ready is None and loader.finish is None:
        packing = loader.packing
        return example_batch(packing.tokens, packing.packs, leaves=loader.leaves, slots=loader.slots or None)
    steps = loader.read()
    try:
        return next(steps).batch
    finally:
        steps.close()  # type: ignore[attr-defined]
