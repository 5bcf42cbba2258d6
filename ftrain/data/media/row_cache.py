"""Rows that the frozen towers of a model made of media, kept in a folder: shards of safetensors, each written whole.

    DIR/cache.json                  which towers, and how media were read; another run must agree
    DIR/shards/<digest>.safetensors rows of some media; its header lists them

Legend: n tokens of a piece of media.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ftrain.data.clips.cache import SHARDS, begin, write_whole
from ftrain.data.media.limits import Limits
from ftrain.data.media.opening import media_bytes
from ftrain.data.sample import Part, Place
from ftrain.files.outside import check, listed, mapped, parse, record, text, whole
from ftrain.hf.files import member, opened

_ITEMS = listed(record({"key": text(64), "rows": mapped(whole(0, 2**31))}))


class RowCache:
    """The rows of media in a folder, by the `key_of` their content. It is read by several threads."""

    def __init__(self, folder: Path) -> None:
        """`folder`: which need not be there yet (`begin`)."""
        self.folder = folder
        self._found: dict[str, tuple[str, Mapping[str, int]]] = {}
        self._known: set[str] = set()

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make the folder, or go on in one. ValueError that names the first thing in which a cache there differs."""
        begin(self.folder, json.loads(json.dumps(config)))

    def look(self) -> None:
        """Read the headers of shards that are not known yet. ValueError for a damaged one."""
        for path in sorted((self.folder / SHARDS).glob("[0-9a-f]*.safetensors")):
            if path.name in self._known:
                continue
            with opened(member(self.folder, path.name, below=SHARDS)) as file:
                told = (file.metadata() or {}).get("items", "null")
            for item in check(parse(told, str(path)), _ITEMS, str(path)):
                self._found[item["key"]] = (path.name, item["rows"])
            self._known.add(path.name)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __len__(self) -> int:
        return len(self._found)

    def write(self, items: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write one shard of rows `[n, ...]` by key and name of leaf. OSError where the disk does not take it."""
        if not items:
            return
        name = f"{hashlib.sha256(' '.join(sorted(items)).encode()).hexdigest()[:32]}.safetensors"
        told = [{"key": key, "rows": {leaf: len(x) for leaf, x in rows.items()}} for key, rows in items.items()]
        tensors = {f"{key}.{leaf}": x.cpu().contiguous() for key, rows in items.items() for leaf, x in rows.items()}
        write_whole(self.folder / SHARDS / name, tensors, {"items": json.dumps(told)})

    def read(self, key: str) -> dict[str, Tensor]:
        """The rows of a piece of media by the names of their leaves. ValueError for a damaged shard."""
        shard, told = self._found[key]
        with opened(member(self.folder, shard, below=SHARDS)) as file:
            found = {leaf: file.get_tensor(f"{key}.{leaf}") for leaf in told}
        if {leaf: len(x) for leaf, x in found.items()} != dict(told):
            raise ValueError(f"{self.folder / SHARDS / shard} is not what its header tells: take it out of the folder")
        return found


def key_of(part: Part, place: Place, limits: Limits) -> str:
    """What tells a piece of media from others: its kind and a digest of its content, wherever it lies. BadRow where it
    cannot be read.
    """
    found = hashlib.sha256(f"{part.kind}{' that is heard' if part.sound else ''} ".encode())
    source, rate = part.source, None
    if isinstance(source, tuple) and len(source) == 2:
        source, rate = np.asarray(source[0]), source[1]
    if isinstance(source, list):
        source = np.asarray(source)
    if isinstance(source, np.ndarray):
        found.update(f"{source.dtype} {source.shape} {rate} ".encode())
        found.update(np.ascontiguousarray(source).tobytes())
    else:
        found.update(media_bytes(source, place, limits))
    return found.hexdigest()
