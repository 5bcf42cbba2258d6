"""Arrays in tensorstore: zarr3 with a crc32c on every chunk, in one OCDBT database per part of the state.

A database (the default) keeps thousands of leaves in a few files; without one every chunk is a file of its own, which
the `zarr` package reads too. All arrays of one save are opened with one `ts.Context`, so that they share a database,
and written in one transaction. Two defaults of tensorstore are dangerous here and are set otherwise: chunks that are
all zero would not be written, and chunks that are lost would be read as zeros.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.manifest import ArrayLeaf
from ftrain.checkpoint.store import KvSpec

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Storage:
    """How arrays are laid out: in a `database` (OCDBT) or a file per chunk; `chunk_bytes`, the upper bound of a chunk;
    `checksum` every chunk (5 GB/s per core when writing, 7 when reading), or trust the disk; `file_bytes`, about how
    long the data files of a database become (one is written while the next is checksummed).

    Raises:
        ValueError: a size is no whole number of at least 1.

    >>> from ftrain.checkpoint import Storage
    >>> Storage(database=False, chunk_bytes=2**20).checksum  # a file per MiB, as any zarr reader takes them
    True
    """

    database: bool = True
    chunk_bytes: int = 16 * _MIB
    checksum: bool = True
    file_bytes: int = 32 * _MIB

    def __post_init__(self) -> None:
        for name, size in (("chunk_bytes", self.chunk_bytes), ("file_bytes", self.file_bytes)):
            if type(size) is not int or size < 1:
                raise ValueError(f"Storage({name}={size!r}) must be a whole number of at least 1")


DEFAULT_STORAGE = Storage()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A block of a stored array: where it begins (an index per dim), and its elements or the room for them."""

    start: tuple[int, ...]
    values: np.ndarray


def write_part(
    where: KvSpec,
    leaves: Mapping[str, ArrayLeaf],
    pieces: Mapping[str, Sequence[Piece]],
    storage: Storage,
    context: ts.Context,
    *,
    create: bool = True,
) -> None:
    """Write these blocks of leaves, all of one part, into the folder `where` and return when they are on the disk.

    A block must begin and end on the chunk grid of its leaf. Its memory is read until the function returns, also when
    it raises. Without `create` the arrays' metadata is left to another rank. Errors of tensorstore pass through.
    """
    transaction = ts.Transaction(atomic=True) if storage.database else None
    opening = [
        ts.open(
            _spec(where, leaf, database=storage.database, checksum=storage.checksum, file_bytes=storage.file_bytes),
            create=create,
            open=not create,
            assume_metadata=not create,
            context=context,
            transaction=transaction,
        )
        for leaf in leaves.values()
    ]
    stores = [future.result() for future in opening]
    # What the driver of `memory://` stores may be the source itself, which the caller will use again.
    borrow = where["driver"] != "memory"
    writes = [
        _block(store, piece).write(piece.values, can_reference_source_data_indefinitely=borrow)
        for path, store in zip(leaves, stores, strict=True)
        for piece in pieces.get(path, ())
    ]
    try:
        if transaction is not None:
            transaction.commit_async().result()
    finally:
        # Also after an error: until a write has ended, it reads the memory that the caller will use again.
        errors = [error for future in writes if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


def merge_databases(where: KvSpec, others: Sequence[str], context: ts.Context) -> None:
    """Take what the databases in these sub-folders of `where` hold into the one of `where` itself.

    Nothing is copied: the one refers to the others' data files. It must be there already.
    """
    transaction = ts.Transaction(atomic=True)
    whole = ts.KvStore.open({"driver": "ocdbt", "base": where}, context=context).result()
    bases = [{**where, "path": f"{where['path']}{name}/"} for name in others]
    opening = [ts.KvStore.open({"driver": "ocdbt", "base": base}, context=context) for base in bases]
    target = whole.with_transaction(transaction)
    copying = [future.result().experimental_copy_range_to(target) for future in opening]
    for copied in copying:
        copied.result()
    transaction.commit_async().result()


def read_part(
    where: KvSpec,
    leaves: Mapping[str, ArrayLeaf],
    pieces: Mapping[str, Sequence[Piece]],
    database: bool,
    checksum: bool,
    context: ts.Context,
    shown: str,
) -> None:
    """Fill the memory of these blocks from the leaves stored in the folder `where`; any blocks, on the chunk grid or
    not: the chunks that they touch are read. One `context` for all calls of a restore keeps the database open between
    them. `shown` is the folder's name in messages.

    Raises:
        DamagedCheckpoint: a leaf is missing, or not what was written; its path is named.
    """
    opening = {
        path: ts.open(_spec(where, leaf, database=database, checksum=checksum), open=True, context=context)
        for path, leaf in leaves.items()
    }
    stores = {path: _checked(future, path, shown) for path, future in opening.items()}
    reading = [
        (path, ts.array(piece.values, copy=False).write(_block(stores[path], piece)))
        for path in leaves
        for piece in pieces[path]
    ]
    failures = [(path, error) for path, future in reading if (error := future.exception()) is not None]
    for path, error in failures:
        raise _damaged(path, shown, error) from error


def _spec(where: KvSpec, leaf: ArrayLeaf, *, database: bool, checksum: bool, file_bytes: int = 0) -> dict[str, Any]:
    """The whole metadata is given when reading too: tensorstore then refuses an array that says otherwise."""
    if database:
        kvstore: dict[str, Any] = {"driver": "ocdbt", "base": where, "path": f"{leaf.key}/"}
        if file_bytes:
            kvstore["target_data_file_size"] = file_bytes
    else:
        kvstore = {**where, "path": f"{where['path']}{leaf.key}/"}
    codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        "metadata": {
            "shape": list(leaf.shape),
            "data_type": leaf.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(leaf.chunk)}},
            "fill_value": _zero(leaf.dtype),
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": codecs + ([{"name": "crc32c"}] if checksum else []),
        },
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def _zero(dtype: str) -> bool | int | float | list[float]:
    if dtype.startswith("complex"):
        return [0.0, 0.0]
    return False if dtype == "bool" else 0 if "int" in dtype else 0.0


def _block(store: ts.TensorStore, piece: Piece) -> ts.TensorStore:
    ends = [begin + size for begin, size in zip(piece.start, piece.values.shape, strict=True)]
    index = tuple(slice(begin, end) for begin, end in zip(piece.start, ends, strict=True))
    return store[index][ts.d[:].translate_to[0]] if index else store


def _checked(future: "ts.Future[ts.TensorStore]", path: str, shown: str) -> ts.TensorStore:
    try:
        return future.result()
    except ValueError as error:
        raise _damaged(path, shown, error) from error


def _damaged(path: str, shown: str, error: Exception) -> DamagedCheckpoint:
    reason = str(error).partition(" [tensorstore_spec=")[0]
    return DamagedCheckpoint(f"leaf {path!r} in {shown} is damaged: {reason}; restore another step")
