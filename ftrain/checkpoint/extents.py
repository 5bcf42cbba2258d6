"""Where the values of a checkpoint's arrays lie: byte ranges of its files."""

import urllib.parse
from typing import Any, NamedTuple

import tensorstore as ts

from ftrain.checkpoint.place import KvSpec


class Extent(NamedTuple):
    """`length` bytes from `offset` of a file, whose name is relative to the folder of the database."""

    file: str
    offset: int
    length: int


def extents(where: KvSpec, context: ts.Context) -> dict[str, Extent]:
    """The values of the OCDBT database in `where` by their keys, except those that are kept in the tree itself (100
    bytes and less). ValueError of tensorstore if the tree is damaged: its nodes carry checksums.
    """
    base = ts.KvStore.open(where, context=context).result()
    root = ts.ocdbt.dump(base, context=context).result()["versions"][-1]["root"]
    found: dict[str, Extent] = {}
    nodes = [(root["location"], b"")] if "location" in root else []
    while nodes:
        asked = [(ts.ocdbt.dump(base, location, context=context), prefix) for location, prefix in nodes]
        nodes = []
        for node, prefix in asked:
            for entry in node.result()["entries"]:
                _note(entry, prefix, found, nodes)
    return found


def _note(entry: dict[str, Any], prefix: bytes, found: dict[str, Extent], nodes: list[tuple[str, bytes]]) -> None:
    """An entry of a node: a value, or a node further down, whose keys lack what they have in common."""
    if "location" in entry:
        nodes.append((entry["location"], prefix + entry["subtree_common_prefix"]))
    elif "indirect_value" in entry:
        _, folder, name, offset, length = entry["indirect_value"].split(":")
        file = urllib.parse.unquote(folder) + urllib.parse.unquote(name)
        found[(prefix + entry["key"]).decode()] = Extent(file, int(offset), int(length))
