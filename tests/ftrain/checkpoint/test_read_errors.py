"""Every way in which a checkpoint and what is asked of it can disagree has an error that names it."""

import os
import re

import pytest
import torch

from ftrain.checkpoint import DamagedCheckpoint, Storage, manifest, restore, save
from tests.helpers.checkpoint_states import same_bits, training_state


def data_files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def flip(path, position=None):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if position is None else position] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(4, 2)}, r"'params.a' is float32\[4, 3\] in .* but float32\[4, 2\] in the state"),
        ({"a": torch.zeros(4, 3).half()}, r"'params.a' is float32\[4, 3\] in .* but float16\[4, 3\]"),
        ({"a": 3}, r"'params.a' is float32\[4, 3\] in .* but of type int"),
        ({"n": 3.0}, r"'params.n' is of type int in .* but of type float"),
        ({"bias": torch.zeros(3)}, r"has no leaf 'params.bias'"),
    ],
)
def test_a_state_that_is_not_the_saved_one(tmp_path, change, message):
    saved = {"a": torch.zeros(4, 3), "n": 1}
    save({"params": saved}, tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        restore({"params": {**saved, **change}}, tmp_path)


def test_a_missing_leaf_is_told_the_nearest_name(tmp_path):
    save({"params": {"w_gate_DF": torch.zeros(2)}}, tmp_path, 1)
    with pytest.raises(ValueError, match=r"no leaf 'params.w_gate'; saved under the name 'params.w_gate_DF'\?"):
        restore({"params": {"w_gate": torch.zeros(2)}}, tmp_path)


def test_a_saved_leaf_that_nobody_asks_for(tmp_path):
    save({"params": {"a": torch.zeros(2)}, "step": 1}, tmp_path, 1)
    with pytest.raises(ValueError, match=r"holds 'step', which the state to restore has not: .* partial=True"):
        restore({"params": {"a": torch.zeros(2)}}, tmp_path)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (-(2**63) - 1, "'params.x' is an integer beyond int64"),
        (object(), "'params.x' is a object: a checkpoint holds tensors, bool, int, float and str"),
        (torch.zeros(2, dtype=torch.bits16), r"'params.x' has dtype torch.bits16, .* view it as uint8"),
        (torch.zeros(2, 2).to_sparse(), r"'params.x' is torch.sparse_coo: .* call .to_dense\(\)"),
    ],
)
def test_leaves_that_cannot_be_saved(tmp_path, leaf, message):
    with pytest.raises(ValueError, match=message):
        save({"params": {"x": leaf}}, tmp_path, 1)
    assert not list(tmp_path.glob("global_step_*"))


def test_two_leaves_of_one_name(tmp_path):
    with pytest.raises(ValueError, match=r"two leaves have the name 'a\.b'"):
        save({"a.b": 1, "a": {"b": 2}}, tmp_path, 1)


def test_steps_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        restore({}, tmp_path)
    save(training_state(), tmp_path, 5)
    with pytest.raises(ValueError, match="holds no step 6; it holds 5"):
        restore(training_state(), tmp_path, 6)


@pytest.mark.parametrize("storage", [Storage(chunk_bytes=64), Storage(database=False)], ids=["database", "files"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named_and_the_last_good_step_still_loads(tmp_path, storage, damage):
    save(training_state(1), tmp_path, 1, storage=storage)
    save(training_state(2), tmp_path, 2, storage=storage)
    for path in data_files(tmp_path / "global_step_2"):
        good = path.read_bytes()
        if damage == "flip":
            flip(path)
        elif damage == "truncate":
            os.truncate(path, len(good) // 2)
        else:
            path.unlink()
        # A step without a manifest does not exist: asked for by number, that is what is said.
        message = re.escape(str(path)) if path.exists() or path.name != "manifest.json" else "holds no step 2"
        with pytest.raises(ValueError, match=message):
            restore(training_state(), tmp_path, 2)
        path.write_bytes(good)
    assert same_bits(restore(training_state(), tmp_path, 1), training_state(1))
    assert same_bits(restore(training_state(), tmp_path, 2), training_state(2))


def test_any_flipped_byte_of_a_large_data_file_is_found(tmp_path, monkeypatch):
    """Files too large for a hash in the manifest rely on the checksums of their chunks, nodes and metadata."""
    monkeypatch.setattr("ftrain.checkpoint.local.HASHED_BYTES", -1)
    state = {"params": {"w": torch.randn(40), "b": torch.arange(9), "m": torch.tensor([True, False])}}
    save(state, tmp_path, 1, storage=Storage(chunk_bytes=64))
    for path in data_files(tmp_path / "global_step_1"):
        good = path.read_bytes()
        for position in range(0, len(good), 7):
            flip(path, position)
            with pytest.raises(DamagedCheckpoint, match=r"params\.|manifest"):
                restore(state, tmp_path)
            path.write_bytes(good)
    assert same_bits(restore(state, tmp_path), state)


def test_a_flipped_chunk_names_its_leaf(tmp_path, monkeypatch):
    monkeypatch.setattr("ftrain.checkpoint.local.HASHED_BYTES", -1)
    state = {"params": {"first": torch.full((64,), 1.0), "second": torch.full((64,), 2.0)}}
    save(state, tmp_path, 1)
    (path,) = data_files(tmp_path / "global_step_1" / "model" / "d")
    flip(path, path.read_bytes().index(state["params"]["second"].numpy().tobytes()) + 100)
    message = r"leaf 'params.second' in .*model is damaged: chunk \[0\] has the CRC-32C .* instead of"
    with pytest.raises(DamagedCheckpoint, match=message):
        restore(state, tmp_path)


def test_a_manifest_of_a_newer_version(tmp_path, monkeypatch):
    now = manifest.VERSION
    monkeypatch.setattr(manifest, "VERSION", now + 1)
    save({"a": 1}, tmp_path, 1)
    monkeypatch.setattr(manifest, "VERSION", now)
    with pytest.raises(ValueError, match=f"has version {now + 1}, this ftrain reads up to {now}: upgrade"):
        restore({"a": 1}, tmp_path)
