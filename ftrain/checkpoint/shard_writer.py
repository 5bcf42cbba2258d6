"""The data of one save: a rank's share of it, and the joining of all shares into one database per part.

Rank 0 writes into `model/`, and the metadata of all arrays; rank r into the database `model/rank_r/`, so that no two
write one. Joined, `model/` refers to the data files of the others, which stay where they are. Without databases a chunk
is a file, and the ranks write theirs side by side.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import tensorstore as ts
import torch
from torch import Tensor

from ftrain.checkpoint.arrays import Piece, Storage, merge_databases, write_part
from ftrain.checkpoint.dtypes import as_array
from ftrain.checkpoint.folders import FILE_BYTES
from ftrain.checkpoint.leaves import Leaves, require_names
from ftrain.checkpoint.manifest import ArrayLeaf
from ftrain.checkpoint.shard_assignment import assign_shards, stored_arrays
from ftrain.checkpoint.shard_layout import Slice
from ftrain.checkpoint.store import FileRecord, NewStep, Records, join
from ftrain.checkpoint.sums import chunk_sums

_DATABASE = "manifest.ocdbt"


@dataclasses.dataclass(frozen=True)
class Work:
    """One save: how each leaf is stored (`arrays`), and by rank the slices that it writes, by path (`slices`)."""

    leaves: Leaves
    storage: Storage
    arrays: dict[str, ArrayLeaf]
    slices: list[dict[str, Slice]]

    @staticmethod
    def of(leaves: Leaves, storage: Storage, world: int) -> "Work":
        """The same on every rank, but for the values in `leaves`. ValueError if a name is too long for a file."""
        if not storage.database:
            require_names(leaves.tensors, longest=FILE_BYTES)
        return Work(leaves, storage, stored_arrays(leaves, storage.chunk_bytes), assign_shards(leaves, world))

    def parts(self, rank: int) -> list[str]:
        """The parts into which a rank writes."""
        paths = self.arrays if rank == 0 else self.slices[rank]
        return sorted({self.arrays[path].part for path in paths})

    def digest(self) -> str:
        """A text that is equal on two ranks if they save the same leaves."""
        plain = [(path, *dataclasses.astuple(leaf)) for path, leaf in self.arrays.items()]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Written:
    """What a rank has written: its `files` (of rank 0 none, see `join_shares`), and the sums of its chunks."""

    files: dict[str, FileRecord]
    sums: dict[str, dict[int, int]]


def write_shard(new: NewStep, work: Work, rank: int) -> Written:
    """Write a rank's share of a step.

    Raises:
        FileNotFoundError: the folder that rank 0 has made is not to be seen from here.
        OSError: the disk is full, the folder is read-only, ...
    """
    if not new.is_here():
        raise FileNotFoundError(
            f"rank {rank} does not see {new.show()}, which rank 0 has made: all ranks must save into one "
            "folder that they share, not each into one of its own machine"
        )
    context, parts = new.context(), work.parts(rank)
    pieces = {path: _piece(work.leaves.tensors[path], box) for path, box in work.slices[rank].items()}
    # All at once: while one waits for the disk another is checksummed.
    with ThreadPoolExecutor(1 + len(parts)) as pool:
        sums = pool.submit(_sums, work, pieces)
        found = list(pool.map(lambda part: _write_part(new, part, work, pieces, rank, context), parts))
    return Written({name: record for records in found for name, record in records.items()}, sums.result())


def _write_part(
    new: NewStep, part: str, work: Work, pieces: Mapping[str, Piece], rank: int, context: ts.Context
) -> dict[str, FileRecord]:
    paths = work.arrays if rank == 0 else work.slices[rank]
    leaves = {path: work.arrays[path] for path in paths if work.arrays[path].part == part}
    own = {path: [pieces[path]] for path in leaves if path in pieces}
    below = join([part, _own_folder(work, rank)])
    write_part(new.kvstore(below), leaves, own, work.storage, context, create=rank == 0)
    return new.records(below) if below != part else {}


def _sums(work: Work, pieces: Mapping[str, Piece]) -> dict[str, dict[int, int]]:
    """Of the chunks that a rank writes, from the memory that they are written from."""
    if not work.storage.checksum:
        return {}
    return {path: chunk_sums(work.arrays[path], piece) for path, piece in pieces.items()}


def join_shards(new: NewStep, work: Work, records: Records) -> dict[str, FileRecord]:
    """After all ranks have written: one database per part, and the step's files. `records`: those of the others."""
    files = dict(records)
    others = [rank for rank in range(1, len(work.slices)) if work.storage.database]
    for part in work.parts(0):
        names = [_own_folder(work, rank) for rank in others if part in work.parts(rank)]
        if names:
            merge_databases(new.kvstore(part), names, new.context())
        for name in names:
            # Left alone it would be a second, partial database that nobody checks.
            new.remove(join([part, name, _DATABASE]))
            del files[join([part, name, _DATABASE])]
    return new.records(known=files)


def _own_folder(work: Work, rank: int) -> str:
    return f"rank_{rank}" if work.storage.database and rank > 0 else ""


def _piece(tensor: Tensor, box: Slice) -> Piece:
    host = tensor.to("cpu", memory_format=torch.contiguous_format).resolve_conj().resolve_neg().contiguous()
    return Piece(tuple(start for start, _ in box), as_array(host))
