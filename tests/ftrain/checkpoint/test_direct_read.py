"""Chunks read straight into their place: any block of any array, nothing left to tensorstore, nothing unchecked."""

import math

import numpy as np
import pytest
import tensorstore as ts
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftrain.checkpoint import DamagedCheckpoint, Storage, checked, open_store, restore, save
from ftrain.checkpoint import direct as direct_module
from ftrain.checkpoint import read as read_module
from ftrain.checkpoint.arrays import Piece, merge_databases, write_part
from ftrain.checkpoint.direct import DirectReader
from ftrain.checkpoint.extents import extents
from ftrain.checkpoint.manifest import ArrayLeaf, Manifest
from ftrain.checkpoint.store import FileRecord
from ftrain.checkpoint.sums import chunk_sums, joined
from ftrain.files.beneath import Folder


@st.composite
def blocks(draw):
    """A shape, a chunk shape, and a box inside."""
    shape = draw(st.lists(st.integers(1, 6), max_size=3))
    chunk = [draw(st.integers(1, n + 1)) for n in shape]
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    ends = [draw(st.integers(start + 1, n)) for start, n in zip(starts, shape, strict=True)]
    return tuple(shape), tuple(chunk), tuple(starts), tuple(ends)


@pytest.mark.parametrize("storage", [Storage(), Storage(database=False), Storage(database=False, checksum=False)])
@given(block=blocks(), summed=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_block_of_any_array(tmp_path_factory, storage, block, summed):
    shape, chunk, starts, ends = block
    folder = tmp_path_factory.mktemp("array")
    where = {"driver": "file", "path": f"{folder}/"}
    leaf = ArrayLeaf(part="model", key="a", shape=shape, dtype="complex128", chunk=chunk)
    values = np.arange(math.prod(shape)).reshape(shape) * (1 + 2j)
    context = ts.Context()
    whole = Piece((0,) * len(shape), values)
    write_part(where, {"a": leaf}, {"a": [whole]}, storage, context)
    files = {f"model/{p.relative_to(folder)}": FileRecord(None, None) for p in folder.rglob("*")}
    sums = joined({"a": leaf}, [{"a": chunk_sums(leaf, whole)}]) if summed else {}
    manifest = Manifest(1, storage.database, storage.checksum, {"a": leaf}, {}, {}, files, sums=sums)
    room = np.zeros([end - start for start, end in zip(starts, ends, strict=True)], values.dtype)
    if summed and not storage.checksum:
        return  # nothing then computes sums
    with DirectReader(manifest, ts.Context()) as reader, Folder(folder) as opened:
        done = reader.read(where, opened, {"a": leaf}, {"a": [Piece(starts, room)]}, "here")
    # Values of up to 100 bytes are kept in the database's tree.
    stored = math.prod(chunk) * 16 + 4 * storage.checksum
    assert done == ({"a"} if stored > 100 or not storage.database else set())
    if done:
        assert (room == values[tuple(map(slice, starts, ends))]).all()


@pytest.fixture
def left_over(monkeypatch):
    """The leaves whose values tensorstore was asked for."""
    seen, read = set(), checked.read_part

    def spy(where, leaves, pieces, *rest):
        seen.update(path for path in leaves if pieces[path])
        read(where, leaves, pieces, *rest)

    monkeypatch.setattr(checked, "read_part", spy)
    return seen


@pytest.mark.parametrize("storage", [Storage(), Storage(chunk_bytes=256), Storage(database=False)], ids=repr)
def test_only_leaves_of_a_few_bytes_are_left_to_tensorstore(tmp_path, storage, left_over):
    state = {"params": {"w": torch.randn(40, 8), "h": torch.randn(70, 3).bfloat16(), "step": torch.tensor(3)}}
    save(state, tmp_path, 1, storage=storage)
    found = restore(state, tmp_path)
    assert torch.equal(found["params"]["w"], state["params"]["w"])
    assert left_over <= {"params.step"}


def test_keys_below_inner_nodes_and_in_joined_databases(tmp_path):
    config = {"max_decoded_node_bytes": 600, "max_inline_value_bytes": 10}
    written = {}
    for folder, letter in (("", "a"), ("rank_1/", "b")):
        base = {"driver": "file", "path": f"{tmp_path}/{folder}"}
        store = ts.KvStore.open({"driver": "ocdbt", "config": config, "base": base}).result()
        transaction = ts.Transaction(atomic=True)
        for i in range(30):
            key = f"common.{letter}{i:03d}/c/0"
            written[key] = key.encode() * (1 + i)
            store.with_transaction(transaction).write(key, written[key]).result()
        transaction.commit_async().result()
    where = {"driver": "file", "path": f"{tmp_path}/"}
    merge_databases(where, ["rank_1"], ts.Context())
    with Folder(tmp_path) as files:
        found = extents(where, ts.Context(), files)
    read = {k: (tmp_path / e.file).read_bytes()[e.offset : e.offset + e.length] for k, e in found.items()}
    assert read == written


@pytest.mark.parametrize("block", [7, 2**18])
def test_a_flipped_byte_in_any_block_of_a_chunk(tmp_path, monkeypatch, block):
    monkeypatch.setattr("ftrain.checkpoint.local.HASHED_BYTES", -1)
    monkeypatch.setattr(direct_module, "_BLOCK", block)
    state = {"params": {"w": torch.randn(13)}}
    save(state, tmp_path, 1, storage=Storage(database=False))
    (path,) = (tmp_path / "global_step_1" / "model" / "params.w" / "c").iterdir()
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with pytest.raises(DamagedCheckpoint, match=r"leaf 'params.w' in .*model is damaged: chunk \[0\] has the CRC"):
            restore(state, tmp_path)
    path.write_bytes(good)
    assert torch.equal(restore(state, tmp_path)["params"]["w"], state["params"]["w"])


def test_a_file_that_is_cut_off_behind_our_back(tmp_path, monkeypatch):
    """The size in the manifest is compared first; a file that shrinks after that is told too."""
    state = {"params": {"w": torch.randn(2000)}}
    save(state, tmp_path, 1, storage=Storage(database=False))
    (path,) = (tmp_path / "global_step_1" / "model" / "params.w" / "c").iterdir()
    path.write_bytes(path.read_bytes()[:5000])
    monkeypatch.setattr(read_module, "check_files", lambda *_: None)
    with pytest.raises(DamagedCheckpoint, match=r"leaf 'params.w' .* params.w/c/0 ends at byte 5000, within a chunk"):
        restore(state, open_store(tmp_path))
