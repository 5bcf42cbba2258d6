"""Rendered chats with what media become in the places of their marks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ftrain.data.media.family import Seen
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Kind, Part, Place
from ftrain.data.turns import Rendered


def with_media(
    rendered: Rendered, marks: Mapping[Kind, str], seen: Sequence[tuple[Part, Seen]], place: Place
) -> Rendered:
    """The chat with the text of each piece of media in the place of its mark, and its turns where they are then.

    Args:
        rendered: the chat, in which the template wrote a mark for each piece.
        marks: by kind of media.
        seen: the pieces, in reading order.
        place: of the row, for errors.

    BadRow where the template leaves pieces out, writes more marks than there are, or in another order.
    """
    for kind, mark in marks.items():
        items = sum(part.kind == kind for part, _ in seen)
        if rendered.text.count(mark) != items:
            detail = f"the chat template writes {mark!r} {rendered.text.count(mark)} times for {items} items of {kind}"
            raise BadRow(place, "placeholders", detail)
    if not seen:
        return rendered
    found = list(re.finditer("|".join(map(re.escape, sorted(marks.values(), key=len, reverse=True))), rendered.text))
    if [match.group() for match in found] != [marks[part.kind] for part, _ in seen]:
        raise BadRow(place, "placeholders", "the chat template writes its media in another order than they are given")
    pieces, moved, at, grown = list[str](), list[tuple[int, int]](), 0, 0
    for match, (_, item) in zip(found, seen, strict=True):
        pieces += [rendered.text[at : match.start()], item.text]
        at, grown = match.end(), grown + len(item.text) - len(match.group())
        moved.append((match.start(), grown))
    text = "".join([*pieces, rendered.text[at:]])

    def place_of(character: int) -> int:
        return character + next((by for start, by in reversed(moved) if start < character), 0)

    turns = [replace(turn, start=place_of(turn.start), end=place_of(turn.end)) for turn in rendered.turns]
    return Rendered(text, tuple(turns))
