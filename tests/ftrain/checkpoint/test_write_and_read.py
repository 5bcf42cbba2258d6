"""What is saved comes back to the bit, under the names and in the formats that others can read."""

import json

import pytest
import tensorstore as ts
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftrain import tree
from ftrain.checkpoint import Storage, latest, restore, save, steps
from ftrain.checkpoint.dtypes import DTYPES
from tests.helpers.checkpoint_states import same_bits, training_state

STORAGES = [Storage(), Storage(database=False), Storage(checksum=False), Storage(chunk_bytes=32)]


def abstract(state):
    return tree.map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, state)


def zarr_array(folder, key, *, database=True):
    files = {"driver": "file", "path": f"{folder}/"}
    kvstore = {"driver": "ocdbt", "base": files, "path": f"{key}/"} if database else f"file://{folder}/{key}/"
    return ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()


@pytest.mark.parametrize("storage", STORAGES, ids=repr)
def test_a_state_comes_back_to_the_bit(tmp_path, storage):
    state = training_state(3)
    save(state, tmp_path, 3, storage=storage)
    assert same_bits(restore(abstract(state), tmp_path), state)


def test_the_names_on_disk_are_those_of_veomni(tmp_path):
    save(training_state(), tmp_path / "checkpoints", 12)
    folder = tmp_path / "checkpoints" / "global_step_12"
    assert sorted(p.name for p in folder.iterdir()) == ["extra_state", "manifest.json", "model", "optimizer"]
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "12\n"


@pytest.mark.parametrize("database", [True, False])
def test_anyones_tensorstore_reads_the_arrays(tmp_path, database):
    state = training_state()
    save(state, tmp_path, 1, storage=Storage(database=database))
    found = zarr_array(tmp_path / "global_step_1" / "model", "params.layers.1.w_DF", database=database)
    assert found.dtype == ts.bfloat16
    expected = state.params["layers"][1]["w_DF"].float().numpy()
    assert (found.read().result().astype("float32") == expected).all()


def test_the_manifest_tells_tree_shapes_and_dtypes_in_plain_json(tmp_path):
    save(training_state(5), tmp_path, 5, metrics={"loss": 1.5})
    manifest = json.loads((tmp_path / "global_step_5" / "manifest.json").read_text())
    assert manifest["arrays"]["params.embed_VD"]["shape"] == [6, 4]
    assert manifest["arrays"]["params.layers.0.w_DF"]["dtype"] == "bfloat16"
    assert manifest["scalars"]["extra.position"] == 5
    assert manifest["metrics"] == {"loss": 1.5}


def test_a_save_is_one_commit_of_the_database(tmp_path):
    """With a context per array each array would be a commit of its own: a crash in between mixes two steps."""
    save(training_state(), tmp_path, 1)
    for part in ("model", "optimizer", "extra_state"):
        store = ts.KvStore.open(f"file://{tmp_path}/global_step_1/{part}/").result()
        versions = ts.ocdbt.dump(store).result()["versions"]
        # Generation 1 is the empty database.
        assert [version["generation_number"] for version in versions] == [1, 2]


def test_chunks_of_zeros_are_written_not_implied(tmp_path):
    """A lost chunk must be an error; so a fresh moment, all zero, has to be on the disk."""
    state = {"opt_state": {"mu": torch.zeros(64, 64)}}
    save(state, tmp_path, 1, storage=Storage(database=False))
    assert len(list((tmp_path / "global_step_1" / "optimizer" / "opt_state.mu" / "c").rglob("*"))) >= 1
    assert same_bits(restore(state, tmp_path), state)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (7, 3)])
def test_every_dtype_and_shape(tmp_path, dtype, shape):
    size = int(torch.tensor(shape).prod()) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    state = [raw.view(dtype).reshape(shape)]
    save(state, tmp_path, 0, storage=Storage(chunk_bytes=16))
    assert same_bits(restore(state, tmp_path), state)


names = st.text(st.characters(exclude_characters=".", exclude_categories=("Cs",)), min_size=1, max_size=20)
integers = st.integers(-(2**63), 2**63 - 1)
scalars = st.one_of(integers, st.floats(), st.booleans(), st.text(st.characters(exclude_categories=("Cs",))))
tensors = st.builds(
    lambda shape, dtype, step: torch.arange(100)[: int(torch.tensor(shape).prod())].reshape(shape).to(dtype) * step,
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.complex64]),
    st.integers(0, 3),
)
trees = st.recursive(
    st.one_of(tensors, scalars),
    lambda below: st.one_of(st.lists(below, max_size=3), st.dictionaries(names, below, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=trees)
def test_any_tree_comes_back(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("tree")
    save({"params": state}, folder, 1)
    assert same_bits(restore({"params": state}, folder), {"params": state})


def test_views_come_back_as_what_they_show(tmp_path):
    base = torch.randn(6, 4)
    state = {"transposed": base.T, "rows": base[::2], "conj": torch.randn(3, dtype=torch.complex64).conj()}
    save(state, tmp_path, 1)
    assert same_bits(restore(state, tmp_path), tree.map(lambda x: x.resolve_conj(), state))


def test_restore_allocates_unless_donated(tmp_path):
    saved, target = training_state(1), training_state(2)
    save(saved, tmp_path, 1)
    fresh = restore(target, tmp_path)
    assert same_bits(target, training_state(2))
    donated = restore(target, tmp_path, donate=True)
    assert same_bits(fresh, saved)
    assert same_bits(donated, saved)
    assert donated.params["embed_VD"].data_ptr() == target.params["embed_VD"].data_ptr()


def test_a_part_of_the_state_can_be_restored_alone(tmp_path):
    state = training_state(4)
    save(state, tmp_path, 4)
    found = restore({"params": abstract(state.params)}, tmp_path, partial=True)
    assert same_bits(found["params"], state.params)


def test_a_named_step_is_restored_and_the_latest_by_default(tmp_path):
    for step in (1, 2, 3):
        save(training_state(step), tmp_path, step)
    assert steps(tmp_path) == [1, 2, 3]
    assert latest(tmp_path) == 3
    assert same_bits(restore(training_state(), tmp_path, 2), training_state(2))
    assert same_bits(restore(training_state(), tmp_path), training_state(3))


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    save(training_state(1), tmp_path, 7)
    save(training_state(2), tmp_path, 7)
    assert same_bits(restore(training_state(), tmp_path, 7), training_state(2))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["global_step_7"]
