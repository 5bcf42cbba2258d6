"""Batches for many ranks: one pack of documents after the other, and within a pack media in parts that ranks encode.

The same arrays are a batch of one device, and shared out (`ftrain.sharding.batch`, with the rules `BATCH`) a batch of
any mesh with `packs` data ranks and `parts` ranks on its sequence axis.

What a step trains on must not depend on the number of packs. So documents are chosen before (`dealing.carry_over`, by
what the whole step has room for), and here all of them are dealt to the packs (`dealing.deal`): packs that are too
small for that grow, and nothing is left out.

Legend: T tokens of a pack, N rows of a modality's features in a pack, n tokens of a modality in a pack.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ftrain.modules.budget import Budget
from ftrain.modules.dealing import deal, item_parts
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Document, Packed, lay, longest_item, measure, padding
from ftrain.sharding.batch import BatchRows, BatchRule, Offsets, TokenIndices

BATCH: Mapping[str, BatchRule] = MappingProxyType(
    {
        "encoders.*.features.*": BatchRows(),
        "encoders.*.features.segments_N.offsets_N": Offsets(of="rows"),
        "encoders.*.index_n": TokenIndices(),
        "decoders.*.target": BatchRows(),
        "decoders.*.index_n": TokenIndices(),
    }
)
"""How ranks share the leaves of a packed omni batch; all others have one entry per token. A plan refuses rules that no
leaf obeys: a model without decoders (or encoders) takes those of its encoders (or decoders) alone."""


def pack_for_mesh(
    documents: Sequence[Document],
    *,
    budget: Budget,
    model: OmniModel,
    packs: int = 1,
    parts: int = 1,
    overflow: Literal["grow", "leave"] = "grow",
) -> Packed:
    """All documents in `packs` packs, in which no item of media lies in two of `parts` equal runs of rows.

    Documents are dealt so that packs have about equal work (`dealing.deal`). Each modality that the budget has room for
    is in the batch, as padding where no document has it, so that all packs have the same arrays. These have the
    budget's sizes; where the packs have no room for all documents they are larger, by as many quarters as it takes, and
    a jitted step is traced for those sizes too. `overflow="leave"` keeps to the budget and says in `left` which
    documents are not in the batch. ValueError if a budget does not divide by `parts`, or for a document that alone
    exceeds it.

    >>> from ftrain.modules.decoder import preset
    >>> from ftrain.modules.packing import Text
    >>> documents = [[Text([5, 6, 7])], [Text([8, 9])], [Text([4])]]
    >>> packed = pack_for_mesh(documents, budget=Budget(4), model=OmniModel(preset("llama-tiny")), packs=2)
    >>> packed.batch["tokens_T"].tolist(), packed.left
    ([5, 6, 7, 0, 8, 9, 4, 0], [])
    """
    if overflow not in ("grow", "leave"):
        raise ValueError(f"overflow={overflow!r} is not 'grow' or 'leave'")
    _check(budget, model, parts)
    sizes = [measure(document, model=model) for document in documents]
    dealt = deal(sizes, budget, packs=packs, parts=parts)
    per_token = {name: model.encoder(name).rows_per_token for name in budget.rows}
    while dealt.left and overflow == "grow":
        budget = budget.grown(dealt.short, parts=parts, rows_per_token=per_token)
        dealt = deal(sizes, budget, packs=packs, parts=parts)
    made, taken = list[dict[str, Any]](), list[int]()
    for numbers in dealt.packs:
        batch, order = lay([documents[i] for i in numbers], budget=budget, model=model, absent="pad")
        encoders = {name: _divide(encoder, name, parts, budget) for name, encoder in batch["encoders"].items()}
        made.append({**batch, "encoders": encoders})
        taken += [numbers[i] for i in order]
    return Packed(_join_packs(made, budget, parts), taken, dealt.left)


def _check(budget: Budget, model: OmniModel, parts: int) -> None:
    for name, rows in budget.rows.items():
        whole = parts * model.encoder(name).rows_per_token
        if rows % whole:
            raise ValueError(f"a budget of {rows} {name} rows does not divide into {parts} parts of whole tokens: "
                             f"make it a multiple of {whole}")  # fmt: skip
    for name, count in budget.targets.items():
        if count % parts:
            raise ValueError(f"a budget of {count} {name} targets does not divide into {parts} parts")


def _divide(encoder: dict[str, Any], name: str, parts: int, budget: Budget) -> dict[str, Any]:
    """The same items dealt to parts (`dealing.item_parts`), for which there is room. Item numbers are ids here."""
    features, index_n, tokens = encoder["features"], encoder["index_n"].numpy(), budget.tokens
    segments_N = features["segments_N"].ids_T.numpy()
    per_token, capacity = len(segments_N) // len(index_n), len(segments_N) // parts
    _, starts, counts = np.unique(segments_N, return_index=True, return_counts=True)
    items = [(int(c), int(s)) for s, c in zip(starts, counts, strict=True) if index_n[s // per_token] < tokens]
    source_N, number_N = np.full(len(segments_N), -1), np.empty(len(segments_N), np.int64)
    used, held = [0] * parts, [0] * parts
    items.sort(reverse=True)
    places = item_parts([count for count, _ in items], parts=parts, capacity=capacity)
    assert places is not None, "deal() gave this pack more items than its parts hold"
    for number, ((count, start), part) in enumerate(zip(items, places, strict=True)):
        at = part * capacity + used[part]
        source_N[at : at + count] = np.arange(start, start + count)
        number_N[at : at + count] = number
        used[part] += count
        held[part] += 1
    longest, free = longest_item([count for count, _ in items], name, budget, capacity), len(items)
    slots = budget.places(name, capacity)
    for part, rows in enumerate(used):  # what is left of each part is items of its own
        room = None if slots is None else slots - held[part] + free
        rest, _ = padding(capacity - rows, longest, free, room)
        number_N[part * capacity + rows : (part + 1) * capacity] = rest
        free += len(np.unique(rest))
    moved = {key: _moved(array, source_N, 0) for key, array in features.items() if key != "segments_N"}
    source_n = np.where(source_N[::per_token] < 0, -1, source_N[::per_token] // per_token)
    index = _moved(encoder["index_n"], source_n, tokens)
    return {"features": {**moved, "segments_N": torch.from_numpy(number_N)}, "index_n": index}


def _moved(array: Tensor, source_N: np.ndarray, fill: int) -> Tensor:
    """Row `source[n]` at place n, `fill` where it is negative."""
    rows = torch.from_numpy(source_N)
    out = array[rows.clamp(min=0)]
    out[rows < 0] = fill
    return out


def _join_packs(packs: Sequence[dict[str, Any]], budget: Budget, parts: int) -> dict[str, Any]:
    """One batch of all packs: documents and items get numbers of their own, places count from the first pack."""
    tokens, end = budget.tokens, budget.tokens * len(packs)
    batch: dict[str, Any] = {
        name: torch.cat([p[name] for p in packs]) for name in ("tokens_T", "labels_T", "positions_T", "valid_T")
    }
    ids_T = _renumbered([p["segments_T"].ids_T for p in packs])
    batch["segments_T"] = budget.documents("tokens", ids_T.numpy(), packs=len(packs))
    batch["encoders"] = {name: _join_encoders([p["encoders"][name] for p in packs], name, budget, parts, end)
                         for name in packs[0]["encoders"]}  # fmt: skip
    batch["decoders"] = {
        name: {
            "target": torch.cat([p["decoders"][name]["target"] for p in packs]),
            "index_n": _places([p["decoders"][name]["index_n"] for p in packs], tokens, end),
        }
        for name in packs[0]["decoders"]
    }
    return batch


def _join_encoders(packed: Sequence[dict[str, Any]], name: str, budget: Budget, parts: int, end: int) -> dict[str, Any]:
    """Of all packs, whose items lie in `parts` parts each."""
    features: dict[str, Any] = {
        key: torch.cat([p["features"][key] for p in packed]) for key in packed[0]["features"] if key != "segments_N"
    }
    ids_N = _renumbered([p["features"]["segments_N"] for p in packed])
    features["segments_N"] = budget.documents(name, ids_N.numpy(), packs=len(packed) * parts)
    return {"features": features, "index_n": _places([p["index_n"] for p in packed], budget.tokens, end)}


def _renumbered(numbers: Sequence[Tensor]) -> Tensor:
    """Ids that no two packs share."""
    found, first = [], 0
    for ids in numbers:
        found.append(ids + first)
        first += int(ids.max()) + 1
    return torch.cat(found)


def _places(index: Sequence[Tensor], tokens: int, end: int) -> Tensor:
    """Places in the stream of all packs; nowhere is its end."""
    return torch.cat([torch.where(i == tokens, end, i + pack * tokens) for pack, i in enumerate(index)])
