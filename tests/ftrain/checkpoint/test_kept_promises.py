"""What a save takes can be read again: what no reader would accept is refused before the commit."""

import pytest
import torch

from ftrain.checkpoint import Checkpointer, Retention, SaveFailed, Storage, delete, restore, save, steps
from ftrain.checkpoint import manifest as manifests
from tests.helpers.checkpoint_states import same_bits, training_state

FILES = Storage(database=False)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({1: 0.5}, "the metric 1 has no text for a name"),
        ({"loss": None}, "the metric 'loss' is None, not a number"),
        ({"loss": "low"}, "the metric 'loss' is 'low', not a number"),
        ({"loss": torch.zeros(2)}, "the metric 'loss' is tensor"),
        ({"\ud800": 0.5}, "has a name that is not UTF-8"),
    ],
)
def test_metrics_are_numbers_by_name(tmp_path, metrics, words):
    with pytest.raises(ValueError, match=words):
        save(training_state(1), tmp_path, 1, metrics=metrics)
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(ValueError, match=words):
        checkpoints.save(training_state(1), 1, metrics)
    assert steps(tmp_path) == []


def test_metrics_may_be_tensors_and_not_finite(tmp_path):
    save(training_state(1), tmp_path, 1, metrics={"loss": torch.tensor(0.5), "norm": float("nan"), "n": 3})
    assert same_bits(restore(training_state(), tmp_path), training_state(1))


@pytest.mark.parametrize(
    ("name", "storage", "words"),
    [
        ("語" * 600, Storage(), "has a name of 5407 bytes as it is stored, and may have 4096: shorten its keys"),
        ("x" * 300, FILES, "has a name of 307 bytes as it is stored, and may have 255"),
        ("\udcff", Storage(), "has a name that is not UTF-8: rename its keys"),
    ],
)
def test_the_name_of_a_leaf_must_fit_where_it_is_stored(tmp_path, name, storage, words):
    with pytest.raises(ValueError, match=words):
        save({"params": {name: torch.zeros(3)}}, tmp_path, 1, storage=storage)
    assert steps(tmp_path) == []


def test_a_manifest_that_no_reader_takes_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "MANIFEST_BYTES", 2**13)
    save(training_state(1), tmp_path, 1)
    words = "the manifest would have .* bytes, and may have 8,192: make tensors of the long texts"
    with pytest.raises(ValueError, match=words):
        save({"text": "a" * 2**14}, tmp_path, 2)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save({"text": "a" * 2**14}, 2)
        with pytest.raises(SaveFailed, match=words):
            checkpoints.wait()
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("step", ["1", 1.0, True, -1])
def test_a_step_is_a_whole_number_for_readers_too(tmp_path, step):
    save(training_state(1), tmp_path, 1)
    for use in (lambda: restore(training_state(), tmp_path, step), lambda: delete(tmp_path, step)):
        with pytest.raises(ValueError, match="a step is a whole number from 0"):
            use()
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Storage(chunk_bytes=0), r"Storage\(chunk_bytes=0\) must be a whole number of at least 1"),
        (lambda: Storage(chunk_bytes=1e6), r"Storage\(chunk_bytes=1000000.0\) must be a whole number"),
        (lambda: Storage(file_bytes=-5), r"Storage\(file_bytes=-5\) must be a whole number"),
        (lambda: Retention(last=2.5), r"Retention\(last=2.5\) would keep nothing or is no whole number"),
        (lambda: Retention(every=True), r"Retention\(every=True\) must be a whole number of at least 1, or None"),
        (lambda: Checkpointer("x", busy="skp"), "busy is 'wait' or 'skip', not 'skp'"),
        (lambda: Checkpointer(b"x"), "a store of checkpoints is a path, a URL or a Store, not b'x'"),
        (lambda: Checkpointer(None), "a store of checkpoints is a path, a URL or a Store, not None"),
        (lambda: Checkpointer("a\0b"), r"'a\\x00b' is no path: it holds a NUL"),
        (lambda: Checkpointer("a\udcff"), r"'a\\udcff' is no UTF-8, and tensorstore opens no such path: rename"),
    ],
)
def test_options_that_mean_nothing_are_refused_where_they_are_given(make, words):
    with pytest.raises(ValueError, match=words):
        make()
