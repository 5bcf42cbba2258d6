"""What memory a loader and its workers hold after many samples. Run in a process of its own."""

import os
import sys
from pathlib import Path

import numpy as np

from experiments.bench.data_packing import lengths
from experiments.bench.data_speed import processes
from ftrain.data.documents import Document, Group, shifted
from ftrain.data.encoding_ahead import Workers
from ftrain.data.loader import Loader
from ftrain.data.order import Order
from ftrain.data.packing import Packing

_TOKENS = 8192
_SCALE = 4  # documents are a quarter as long as chats are, so that many of them take little time
_PAGE = os.sysconf("SC_PAGE_SIZE")


def encode(length: int) -> Group:
    """A document of this length."""
    ids = np.arange(length, dtype=np.int64)
    return Group((Document(ids, shifted(ids)),))


def resident() -> int:
    """Bytes of this process and its children that are in memory."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in processes()) * _PAGE


def main(marks: list[int]) -> int:
    """Print resident bytes after as many samples as each mark says."""
    rows = (lengths(50_000, _TOKENS * _SCALE) // _SCALE).clip(1).tolist()
    loader = Loader(
        Order([len(rows)], key=0), [rows], encode, Packing(_TOKENS), steps=2**30, workers=Workers(processes=1)
    )
    waiting, documents = sorted(marks), 0
    for step in loader:
        documents += step.facts.documents
        while waiting and documents >= waiting[0]:
            print(waiting.pop(0), resident(), flush=True)
        if not waiting:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main([int(mark) for mark in sys.argv[1:]]))
