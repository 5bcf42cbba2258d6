"""Batches for many ranks: one pack of documents after the other, and within a pack media in parts that ranks encode.

The same arrays are a batch of one device, and shared out (`sharding.batch`, with the rules `BATCH`) a batch of any mesh
with `packs` data ranks and `parts` ranks on its sequence axis.

Legend: T tokens of a pack, N rows of a modality's features in a pack, n tokens of a modality in a pack.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.omni import OmniModel
from modules.packing import Budget, Document, Packed, Text, longest_item, pack, padding
from sharding.batch import BatchRule, Offsets, Places, Rows

BATCH: Mapping[str, BatchRule] = MappingProxyType(
    {
        "encoders.*.features.*": Rows(),
        "encoders.*.features.segments_N.offsets_N": Offsets(of="rows"),
        "encoders.*.index_n": Places(),
        "decoders.*.target": Rows(),
        "decoders.*.index_n": Places(),
    }
)
"""How ranks share the leaves of a packed omni batch; all others have one entry per token."""


def pack_for_mesh(
    documents: Sequence[Document], *, budget: Budget, model: OmniModel, packs: int = 1, parts: int = 1
) -> Packed:
    """`packs` packs of `budget` each, in which no item of media lies in two of `parts` equal runs of rows.

    Documents are taken in order, pack after pack; each modality of the budget is in the batch, as padding where no
    document has it, so that all packs have the same arrays. ValueError if a budget does not divide by `parts`.
    """
    _check(budget, model, parts)
    made: list[dict[str, Any]] = []
    taken: list[int] = []
    rest = list(range(len(documents)))
    for _ in range(packs):
        batch, here, rest = _one_pack(documents, rest, budget, model, parts)
        made.append(batch)
        taken += here
    return Packed(_join_packs(made, budget, parts), taken, rest)


def _check(budget: Budget, model: OmniModel, parts: int) -> None:
    for name, rows in budget.rows.items():
        whole = parts * model.encoder(name).rows_per_token
        if rows % whole:
            raise ValueError(f"a budget of {rows} {name} rows does not divide into {parts} parts of whole tokens: "
                             f"make it a multiple of {whole}")  # fmt: skip
    for name, count in budget.targets.items():
        if count % parts:
            raise ValueError(f"a budget of {count} {name} targets does not divide into {parts} parts")


def _one_pack(
    documents: Sequence[Document], rest: list[int], budget: Budget, model: OmniModel, parts: int
) -> tuple[dict[str, Any], list[int], list[int]]:
    """The first of `rest` that fit, fewer if their media cannot be dealt to the parts; and what is left."""
    candidates = list(rest)
    while True:
        packed = pack([documents[i] for i in candidates] or [_NOTHING], budget=budget, model=model, absent="pad")
        taken = [candidates[i] for i in packed.taken] if candidates else []
        encoders = packed.batch["encoders"]
        divided = {name: _divide(encoders[name], name, parts, budget) for name in budget.rows}
        if None not in divided.values():
            return {**packed.batch, "encoders": divided}, taken, [i for i in rest if i not in taken]
        if len(taken) == 1:
            raise ValueError(
                f"document {taken[0]}: its media does not fit {parts} parts of a budget of {dict(budget.rows)} rows, "
                "since no item may lie in two parts: raise the budget"
            )
        candidates = sorted(taken)[:-1]


_NOTHING = [Text([0])]  # what stands in a pack for which no document is left: one token without a label


def _divide(encoder: dict[str, Any], name: str, parts: int, budget: Budget) -> dict[str, Any] | None:
    """The same items dealt to parts, the longest first; None if they do not fit. Item numbers are ids here."""
    features, index_n, tokens = encoder["features"], encoder["index_n"].numpy(), budget.tokens
    segments_N = features["segments_N"].ids_T.numpy()
    per_token, capacity = len(segments_N) // len(index_n), len(segments_N) // parts
    _, starts, counts = np.unique(segments_N, return_index=True, return_counts=True)
    items = [(int(c), int(s)) for s, c in zip(starts, counts, strict=True) if index_n[s // per_token] < tokens]
    source_N, number_N = np.full(len(segments_N), -1), np.empty(len(segments_N), np.int64)
    used, held = [0] * parts, [0] * parts
    for number, (count, start) in enumerate(sorted(items, reverse=True)):
        part = used.index(min(used))
        if used[part] + count > capacity:
            return None
        at = part * capacity + used[part]
        source_N[at : at + count] = np.arange(start, start + count)
        number_N[at : at + count] = number
        used[part] += count
        held[part] += 1
    longest, free = longest_item([count for count, _ in items], name, budget, capacity), len(items)
    places = budget.places(name, capacity)
    for part, rows in enumerate(used):  # what is left of each part is items of its own
        room = None if places is None else places - held[part] + free
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
