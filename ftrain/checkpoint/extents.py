"""Where the values of a checkpoint's arrays lie: byte ranges of its files.

The tree that tells it may come from anybody, and a few bytes of it may unpack to gigabytes, or lead in circles. So its
nodes are looked at before they are unpacked, and each is read once.
"""

import os
import urllib.parse
from typing import Any, NamedTuple

import tensorstore as ts

from ftrain.checkpoint.store import Files, KvSpec

_NODE = b"\x0c\xdb"  # with what every node and manifest of OCDBT begins
_HEADER, _CRC = 14, 4  # magic, length, version, how it is compressed; a checksum behind
_ZSTD = b"\x28\xb5\x2f\xfd"
_BLOCK = 2**17  # what a block of zstd unpacks to at most
TREE_BYTES = 2**26


class Extent(NamedTuple):
    """`length` bytes from `offset` of a file, whose name is relative to the folder of the database."""

    file: str
    offset: int
    length: int

    def read(self, files: Files) -> bytes:
        """These bytes; ValueError if the file ends before."""
        descriptor = files.open(self.file)
        try:
            # Looked at before the memory is taken: the length may be any number.
            whole = self.offset >= 0 and self.offset + self.length <= os.fstat(descriptor).st_size
            content = os.pread(descriptor, self.length, self.offset) if whole else b""
        finally:
            os.close(descriptor)
        if len(content) != self.length:
            raise ValueError(f"{self.file} ends within bytes {self.offset} to {self.offset + self.length}")
        return content


def extents(where: KvSpec, context: ts.Context, files: Files, *, limit: int = TREE_BYTES) -> dict[str, Extent]:
    """The values of the OCDBT database in `where` by their keys, except those that are kept in the tree itself (100
    bytes and less). `files`: those of the same folder. `limit`: bytes that the tree may take when it is unpacked.

    ValueError if the tree is damaged (its nodes carry checksums), or leads out of the folder.
    """
    base = ts.KvStore.open(where, context=context).result()
    descriptor = files.open("manifest.ocdbt")
    try:
        budget = _Budget(limit)
        budget.take(os.pread(descriptor, limit + 1, 0), "manifest.ocdbt")
    finally:
        os.close(descriptor)
    root = ts.ocdbt.dump(base, context=context).result()["versions"][-1]["root"]
    found: dict[str, Extent] = {}
    nodes = [(root["location"], b"")] if "location" in root else []
    seen: set[Extent] = set()
    while nodes:
        for location, _ in nodes:
            extent = _extent_of(location)
            if extent in seen:
                raise ValueError(f"its tree comes twice to the node at {extent.offset} of {extent.file}")
            seen.add(extent)
            budget.take(extent.read(files), extent.file)
        asked = [(ts.ocdbt.dump(base, location, context=context), prefix) for location, prefix in nodes]
        nodes = []
        for node, prefix in asked:
            for entry in node.result()["entries"]:
                _note(entry, prefix, found, nodes)
    return found


class _Budget:
    """How many bytes the nodes of a tree may still take when they are unpacked."""

    def __init__(self, limit: int) -> None:
        self._limit = self._left = limit

    def take(self, node: bytes, file: str) -> None:
        """ValueError if there is not so much left."""
        self._left -= unpacked_bytes(node)
        if self._left < 0:
            raise ValueError(f"the tree in {file} unpacks to more than {self._limit:,} bytes")


def unpacked_bytes(node: bytes) -> int:
    """How many bytes a node of OCDBT takes at most when it is unpacked: told by its blocks, without unpacking any.

    ValueError if it is no node, or packed otherwise than by zstd.
    """
    packed = node[_HEADER : len(node) - _CRC]
    if node[:2] != _NODE or node[12:_HEADER] not in (b"\0\0", b"\0\1"):
        raise ValueError("a node of its tree has an unknown header")
    if node[13] == 0:
        return len(node)
    if not packed.startswith(_ZSTD) or len(packed) < 18:
        raise ValueError("a node of its tree is not packed as it says")
    at, total = len(_ZSTD), 0
    descriptor = packed[at]
    single = descriptor >> 5 & 1
    size_bytes = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    at += 1 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3] + size_bytes
    last = False
    while not last and at + 3 <= len(packed):
        header = int.from_bytes(packed[at : at + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        total += _BLOCK if kind == 2 else size
        at += 3 + (1 if kind == 1 else size)
    # Another frame behind the first would be unpacked as well.
    return total + (len(packed) - at > 4) * TREE_BYTES * 2


def _extent_of(location: str) -> Extent:
    """A location is `kind:folder:name:offset:length`, its texts percent-encoded."""
    _, folder, name, offset, length = location.split(":")
    return Extent(urllib.parse.unquote(folder) + urllib.parse.unquote(name), int(offset), int(length))


def _note(entry: dict[str, Any], prefix: bytes, found: dict[str, Extent], nodes: list[tuple[str, bytes]]) -> None:
    """An entry of a node: a value, or a node further down, whose keys lack what they have in common."""
    if "location" in entry:
        nodes.append((entry["location"], prefix + entry["subtree_common_prefix"]))
    elif "indirect_value" in entry:
        found[(prefix + entry["key"]).decode()] = _extent_of(entry["indirect_value"])
