"""Saved on any layout, restored on any other: equal to the bit, each part written once and only what is needed read."""

import itertools

import pytest
import tensorstore as ts
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftrain.checkpoint import SaveFailed, Storage, Window, open_store, restore, save, shard_writer, steps
from ftrain.checkpoint.shard_assignment import assign_shards, stored_arrays
from ftrain.checkpoint.shard_layout import elements, grid_piece, whole
from ftrain.checkpoint.write import write_checkpoint
from ftrain.sharding.mesh import Mesh
from tests.helpers.checkpoint_layouts import LAYOUTS, placements, whole_leaves
from tests.helpers.checkpoint_states import same_bits
from tests.helpers.checkpoint_threads import on_all_ranks, pieces_of, save_pieces

SMALL_CHUNKS = Storage(chunk_bytes=64)


def windows_of(mesh, rank):
    leaves = whole_leaves()
    parts = {name: Window(p.shape, leaves[name].dtype, p.windows(mesh, rank)) for name, p in placements(mesh).items()}
    return {"params": parts, "position": 0}


def whole_state(seed=0):
    return {"params": whole_leaves(seed), "position": seed}


@pytest.mark.parametrize("database", [True, False], ids=["database", "files"])
@pytest.mark.parametrize("saved", LAYOUTS)
def test_every_layout_is_restored_on_every_other(tmp_path, saved, database):
    assert not any(save_pieces(tmp_path, LAYOUTS[saved], seed=3, storage=Storage(database, chunk_bytes=64)))
    assert same_bits(restore(whole_state(), tmp_path), whole_state(3))
    for mesh in LAYOUTS.values():
        for rank in range(mesh.size):
            found = restore(windows_of(mesh, rank), tmp_path)
            expected = pieces_of(mesh, rank, seed=3).tensors
            assert same_bits(found["params"], {name: expected[f"params.{name}"] for name in found["params"]})


@pytest.mark.parametrize("mesh", LAYOUTS.values(), ids=LAYOUTS)
def test_every_element_is_written_once(mesh):
    leaves = pieces_of(mesh, 0)
    work = assign_shards(leaves, mesh.size)
    for name, array in whole_leaves().items():
        times = torch.zeros(array.shape)
        for slices in work:
            if f"params.{name}" in slices:
                times[tuple(slice(a, a + n) for a, n in slices[f"params.{name}"])] += 1
        assert (times == 1).all(), name


def test_replicas_share_the_work():
    mesh = Mesh(4, 2)
    leaves = pieces_of(mesh, 0)
    sizes = {path: tensor.itemsize for path, tensor in leaves.tensors.items()}
    loads = [sum(elements(box) * sizes[path] for path, box in slices.items()) for slices in assign_shards(leaves, 8)]
    assert sum(loads) == sum(leaf.nbytes for leaf in whole_leaves().values())
    assert sum(load > 0 for load in loads) >= 7
    assert max(loads) <= 19 * 6 * 4  # half of the largest leaf, which cannot be divided further


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    cuts=st.lists(st.integers(1, 7), min_size=3, max_size=3),
)
def test_no_box_ends_within_a_block(shape, cuts):
    steps_ = [-(-size // n) for size, n in zip(shape, cuts, strict=False)]
    edges = [range(0, size, step) for size, step in zip(shape, steps_, strict=True)]
    slices = [
        tuple((a, min(step, size - a)) for a, step, size in zip(corner, steps_, shape, strict=True))
        for corner in itertools.product(*edges)
    ]
    assert grid_piece(shape, slices) == tuple(min(step, size) for step, size in zip(steps_, shape, strict=True))
    assert grid_piece(shape, [whole(shape)]) == shape


def test_the_arrays_are_whole_for_anyone(tmp_path):
    save_pieces(tmp_path, LAYOUTS["experts 2 x 2"], seed=1)
    base = {"driver": "file", "path": f"{tmp_path}/global_step_1/model/"}
    store = {"driver": "ocdbt", "base": base, "path": "params.embed_VD/"}
    found = ts.open({"driver": "zarr3", "kvstore": store}, open=True).result().read().result()
    assert (found == whole_leaves(1)["embed_VD"].numpy()).all()
    assert not list(tmp_path.rglob("rank_*/manifest.ocdbt"))


def test_a_rank_reads_the_bytes_of_its_own_part(tmp_path):
    rows, columns = 4096, 256
    array = torch.randn(rows, columns)
    save({"params": array}, tmp_path, 1, storage=Storage(chunk_bytes=64 * 1024))
    half = Window((rows, columns), torch.float32, ((rows // 2, rows // 2), (0, columns)))
    read = []
    for leaf in (array, half):
        before = bytes_read()
        restore({"params": leaf}, tmp_path)
        read.append(bytes_read() - before)
    assert array.nbytes <= read[0] < 1.05 * array.nbytes
    assert array.nbytes / 2 <= read[1] < 1.05 * array.nbytes / 2


def bytes_read():
    """By all reads of this process, of tensorstore and of Python."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("database", [True, False], ids=["database", "files"])
def test_an_error_on_one_rank_is_an_error_on_all(tmp_path, monkeypatch, failing, database):
    mesh, storage = LAYOUTS["fsdp 4"], Storage(database)
    assert not any(save_pieces(tmp_path, mesh, step=1, seed=1, storage=storage))
    write = shard_writer.write_part

    def full_disk(where, *args, create, **kwargs):
        if (f"rank_{failing}/" in where["path"]) if failing and database else create == (failing == 0):
            raise OSError(28, "No space left on device", where["path"])
        write(where, *args, create=create, **kwargs)

    monkeypatch.setattr(shard_writer, "write_part", full_disk)
    errors = save_pieces(tmp_path, mesh, step=2, seed=2, storage=storage)
    assert all("No space left on device" in str(error) for error in errors)
    if failing and database:
        assert str(errors[1]).startswith("rank 2: OSError")
    assert steps(tmp_path) == [1]
    assert not list(tmp_path.glob("*.tmp*"))
    assert same_bits(restore(whole_state(), tmp_path), whole_state(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda leaves: leaves.scalars.update(position=9), "rank 1 saves 9 as 'position' and rank 0 0"),
        (lambda leaves: leaves.tensors.pop("params.bias_1"), "rank 1 saves other arrays than rank 0"),
    ],
)
def test_ranks_that_save_two_states(tmp_path, change, message):
    mesh = LAYOUTS["fsdp 3"]

    def save_it(ranks):
        leaves = pieces_of(mesh, ranks.rank)
        if ranks.rank == 1:
            change(leaves)
        write_checkpoint(open_store(tmp_path), 1, lambda: leaves, storage=SMALL_CHUNKS, metrics={}, ranks=ranks)

    for error in on_all_ranks(mesh.size, save_it):
        assert isinstance(error, SaveFailed)
        assert message in str(error)


def test_a_rank_that_does_not_see_the_folder(tmp_path):
    mesh = Mesh(1, 2)

    def save_it(ranks):
        root = tmp_path / f"machine_{ranks.rank}"
        root.mkdir()
        leaves = pieces_of(mesh, ranks.rank)
        write_checkpoint(open_store(root), 1, lambda: leaves, storage=SMALL_CHUNKS, metrics={}, ranks=ranks)

    assert all("does not see" in str(e) and "one folder" in str(e) for e in on_all_ranks(2, save_it))


def test_chunks_hold_no_more_than_asked(tmp_path):
    leaves = pieces_of(LAYOUTS["fsdp 3"], 0)
    for leaf in stored_arrays(leaves, 64).values():
        assert torch.tensor(leaf.chunk).prod() * getattr(torch, leaf.dtype).itemsize <= 4 * 64


def test_a_window_has_nothing_to_save_and_lies_inside(tmp_path):
    with pytest.raises(ValueError, match=r"'params' is a Window"):
        save({"params": Window((4,), torch.float32, ((0, 2),))}, tmp_path, 1)
    with pytest.raises(ValueError, match=r"the box \(\(3, 2\),\) is not inside an array of shape \[4\]"):
        Window((4,), torch.float32, ((3, 2),))
