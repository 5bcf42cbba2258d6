"""Pieces of media dealt to the packs of a batch and to equal parts of them, none of which lies in two."""

from collections.abc import Sequence
from typing import NamedTuple

from ftrain.modules.dealing import eased, item_parts


class Told(NamedTuple):
    """How messages call things: the argument of the budget, what is counted, whole groups of it, media, a piece."""

    budget: str
    counted: str
    groups: str
    media: str
    piece: str


PICTURES = Told("patches", "patches", "whole squares of", "pictures", "frames")
SOUND = Told("chunks", "chunks", "whole chunks, multiples of", "recordings", "windows")


def deal(
    sizes: Sequence[int],
    homes: Sequence[int],
    *,
    unit: int,
    budget: int | None,
    packs: int,
    parts: int,
    told: Told,
    easily: bool = False,
) -> tuple[list[list[int]], int]:
    """The numbers of the pieces of each part of each pack, and how much a part has room for.

    `sizes`: of the pieces, multiples of `unit`; `homes`: their packs. `budget`: the room of a pack; None: as much as
    that with the most needs, or `easily` somewhat more (`eased`). ValueError where the budget is no `parts` of whole
    units, or too small.
    """
    if budget is not None and (budget < 1 or budget % (unit * parts)):
        raise ValueError(f"{told.budget}={budget} are not {parts} equal parts of {told.groups} {unit}")
    held: list[list[int]] = [[] for _ in range(packs)]
    for piece, home in enumerate(homes):
        held[home].append(piece)
    most = max(sum(sizes[piece] for piece in own) for own in held)
    room = max(1, -(-most // (unit * parts))) * unit if budget is None else budget // parts
    while (chosen := _parts_of(held, sizes, parts, room)) is None:
        if budget is not None:
            raise ValueError(
                f"a pack has {told.media} of {most} {told.counted}, in {told.piece} of up to {max(sizes)}, for which "
                f"{told.budget}={budget} in {parts} parts have no room: raise it, or give a pack fewer {told.media}"
            )
        room += unit
    return chosen, eased(room // unit) * unit if easily and budget is None else room


def _parts_of(held: Sequence[Sequence[int]], sizes: Sequence[int], parts: int, room: int) -> list[list[int]] | None:
    found: list[list[int]] = [[] for _ in range(len(held) * parts)]
    for pack, own in enumerate(held):
        part_of = item_parts([sizes[piece] for piece in own], parts=parts, capacity=room)
        if part_of is None:
            return None
        for piece, part in zip(own, part_of, strict=True):
            found[pack * parts + part].append(piece)
    return found
