"""Checkpoints by URL: in this process's memory, and on a real S3 server on loopback."""

import json
import socket

import pytest
import torch

from ftrain.checkpoint import (
    Bucket,
    Checkpointer,
    DamagedCheckpoint,
    Retention,
    SaveFailed,
    Storage,
    Window,
    delete,
    latest,
    open_store,
    restore,
    save,
    shard_writer,
    steps,
)
from ftrain.checkpoint import read as read_module
from tests.helpers.checkpoint_layouts import LAYOUTS, whole_leaves
from tests.helpers.checkpoint_states import same_bits, training_state
from tests.helpers.checkpoint_threads import save_pieces


@pytest.fixture(params=["memory", "s3"])
def store(request):
    if request.param == "memory":
        return Bucket("memory://run/checkpoints")
    name = request.node.name.replace("[", "-").replace("]", "")
    return Bucket(f"s3://runs/{name}/checkpoints", request.getfixturevalue("s3"))


@pytest.mark.parametrize("database", [True, False], ids=["database", "files"])
def test_a_run_saves_resumes_and_keeps_the_last(store, database):
    with Checkpointer(store, keep=Retention(last=2), storage=Storage(database)) as checkpoints:
        assert checkpoints.latest() is None
        for step in (10, 20, 30):
            checkpoints.save(training_state(step), step)
        assert same_bits(checkpoints.restore(training_state()), training_state(30))
    assert steps(store) == [20, 30]
    assert same_bits(restore(training_state(), store, 20), training_state(20))
    assert {name.split("/")[0] for name in names(store)} == {
        "global_step_20", "global_step_30", "latest_checkpointed_iteration.txt",
    }  # fmt: skip


def names(store):
    return [key.decode() for key in store.objects.store.list().result()]


@pytest.mark.parametrize("database", [True, False], ids=["database", "files"])
def test_ranks_save_into_a_bucket_and_one_process_restores(store, database):
    storage = Storage(database, chunk_bytes=64)
    assert not any(save_pieces(store, LAYOUTS["experts 2 x 2"], seed=5, storage=storage))
    state = {"params": whole_leaves(0), "position": 0}
    assert same_bits(restore(state, store), {"params": whole_leaves(5), "position": 5})


def test_a_step_exists_when_its_manifest_does(store):
    """Whatever a save had written when it stopped, readers see the last good step, and the next save cleans up."""
    save(training_state(1), store, 1)
    save(training_state(2), store, 2)
    written = {name: store.objects.store.read(name).result().value for name in names(store) if "global_step_2/" in name}
    delete(store, 2)
    assert steps(store) == [1]
    for name, value in written.items():
        if not name.endswith("manifest.json"):
            store.objects.store.write(name, value).result()
            assert steps(store) == [1]
            assert latest(store) == 1
            assert same_bits(restore(training_state(), store), training_state(1))
    store.objects.store.write("global_step_2/manifest.json", written["global_step_2/manifest.json"]).result()
    assert latest(store) == 1
    assert same_bits(restore(training_state(), store, 2), training_state(2))
    store.delete(2)
    store.objects.store.write("global_step_2/model/d/left_by_a_crash", b"1").result()
    save(training_state(3), store, 3)
    assert not [name for name in names(store) if "global_step_2" in name]


def test_a_step_written_again_replaces_the_old_one_when_it_is_whole(store, monkeypatch):
    for seed in (1, 2, 3):
        save(training_state(seed), store, 7)
        assert same_bits(restore(training_state(), store), training_state(seed))
    manifest = json.loads(store.read("global_step_7/manifest.json", limit=2**20))
    parts = {"/".join(name.split("/")[:2]) for name in names(store) if name.startswith("global_step_7/")}
    assert parts == {f"global_step_7/{manifest['base']}", "global_step_7/manifest.json"}
    with monkeypatch.context() as broken:
        broken.setattr(shard_writer, "write_part", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(training_state(4), store, 7)
    assert same_bits(restore(training_state(), store), training_state(3))


def test_a_failed_commit_leaves_the_last_good_step(store, monkeypatch):
    with Checkpointer(store) as checkpoints:
        checkpoints.save(training_state(1), 1)
        checkpoints.wait()
        monkeypatch.setattr(shard_writer, "write_part", lambda *args, **kwargs: 1 / 0)
        checkpoints.save(training_state(2), 2)
        with pytest.raises(SaveFailed, match=r"saving step 2 into (memory|s3)://run.*the last good step is 1"):
            checkpoints.wait()
    assert not [name for name in names(store) if "global_step_2" in name]
    assert same_bits(restore(training_state(), store), training_state(1))


def test_a_damaged_or_missing_object_is_named(store):
    save(training_state(1), store, 1)
    for name in names(store):
        good = store.objects.store.read(name).result().value
        if name.startswith("global_step_1/"):
            middle = len(good) // 2
            bad = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
            for value in (bad, None):
                store.objects.store.write(name, value).result()
                with pytest.raises(ValueError, match=r"global_step_1|holds no"):
                    restore(training_state(), store)
            store.objects.store.write(name, good).result()
    assert same_bits(restore(training_state(), store), training_state(1))


def test_urls(tmp_path):
    assert isinstance(open_store("memory://a"), Bucket)
    assert open_store("memory://a/b/").show("global_step_1") == "memory://a/b/global_step_1"
    assert open_store(tmp_path).show() == str(tmp_path)
    with pytest.raises(ValueError, match="'ftp://a/b' is no store of checkpoints: give a path, or one of s3://"):
        save({}, "ftp://a/b", 1)


class Answers:
    """A store whose answers to reads go wrong: `wrong(name, answer, count)` gives the one that is returned."""

    def __init__(self, store, wrong):
        self._store, self._wrong, self._count = store.objects.store, wrong, {}

    def __getattr__(self, name):
        return getattr(self._store, name)

    def read(self, name):
        self._count[name] = count = self._count.get(name, 0) + 1
        return Answer(self._wrong(name, self._store.read(name).result(), count))


class Answer:
    def __init__(self, found):
        self._found = found

    def result(self, timeout=None):
        return self._found


class Missing:
    state, value = "missing", b""


class Flipped:
    state = "value"

    def __init__(self, value, bit):
        self.value = bytes([value[0] ^ (1 << bit)]) + value[1:]


@pytest.mark.parametrize("database", [True, False], ids=["database", "files"])
@pytest.mark.parametrize("name", ["manifest.ocdbt", "zarr.json", "manifest.json"])
@pytest.mark.parametrize("answers", ["missing once", "flipped once", "missing twice"])
def test_one_wrong_answer_is_not_believed(database, name, answers, monkeypatch):
    """What is read back goes into the manifest: a save that returns is one that can be read."""
    store, storage = Bucket("memory://run"), Storage(database)
    monkeypatch.setattr("ftrain.checkpoint.objects.time.sleep", lambda seconds: None)

    def wrong(asked, found, count):
        if not asked.endswith(name) or not found.value:
            return found
        if count == 1 or (count == 2 and answers == "missing twice"):
            return Flipped(found.value, 2) if answers == "flipped once" else Missing()
        return found

    whole = store.objects.store
    store.objects.store = Answers(store, wrong)
    save(training_state(1), store, 1, storage=storage)
    store.objects.store = whole
    assert same_bits(restore(training_state(), store), training_state(1))


@pytest.mark.parametrize("kind", ["missing", "flipped"])
def test_a_store_that_answers_wrongly_for_good_fails_the_save_and_the_good_steps_stay(kind, monkeypatch):
    store = Bucket("memory://run")
    monkeypatch.setattr("ftrain.checkpoint.objects.time.sleep", lambda seconds: None)
    with Checkpointer(store, keep=Retention(last=1)) as checkpoints:
        checkpoints.save(training_state(1), 1)
        checkpoints.wait()
        whole = store.objects.store

        def wrong(asked, found, count):
            if not asked.endswith("manifest.ocdbt") or not found.value:
                return found
            return Missing() if kind == "missing" else Flipped(found.value, count % 8)

        store.objects.store = Answers(store, wrong)
        checkpoints.save(training_state(2), 2)
        with pytest.raises(SaveFailed, match=r"is missing or differs at each reading.*the last good step is 1"):
            checkpoints.wait()
        store.objects.store = whole
    assert steps(store) == [1]
    assert same_bits(restore(training_state(), store), training_state(1))


def test_a_restore_from_a_bucket_while_the_step_is_replaced_is_of_one_version(monkeypatch):
    store = Bucket("memory://run")
    save(training_state(1), store, 7)
    check, left = read_module.check_files, [2]

    def then_replaced(held, manifest, parts):
        check(held, manifest, parts)
        if left[0]:
            left[0] -= 1
            save(training_state(10 + left[0]), store, 7)

    monkeypatch.setattr(read_module, "check_files", then_replaced)
    assert same_bits(restore(training_state(), store), training_state(10))


def test_a_listing_that_lacks_a_manifest_costs_no_step(monkeypatch):
    """A save takes a folder without a manifest for a leftover: it asks for it by name before it deletes."""
    store = Bucket("memory://run/checkpoints")
    for step in (1, 2):
        save(training_state(step), store, step)
    real = store.objects.names
    with monkeypatch.context() as stale:
        stale.setattr(
            store.objects, "names", lambda prefix: [n for n in real(prefix) if not n.endswith("_1/manifest.json")]
        )
        assert steps(store) == [2]
        assert same_bits(restore(training_state(), store, 1), training_state(1))
        save(training_state(3), store, 3)
        save(training_state(4), store, 1)  # not among what is there already
    assert steps(store) == [1, 2, 3]
    for step, seed in ((1, 4), (2, 2), (3, 3)):
        assert same_bits(restore(training_state(), store, step), training_state(seed))


def test_the_latest_step_is_found_by_its_name(monkeypatch):
    store = Bucket("memory://run/checkpoints")
    for step in (1, 2):
        save(training_state(step), store, step)
    real = store.objects.names
    monkeypatch.setattr(
        store.objects, "names", lambda prefix: [n for n in real(prefix) if not n.endswith("_2/manifest.json")]
    )
    assert latest(store) == 2
    assert same_bits(restore(training_state(), store), training_state(2))


@pytest.mark.parametrize("box", [((1, 2), (0, 4)), ((0, 16), (1, 2)), ((3, 6), (0, 4))])
def test_a_part_of_a_chunk_from_elsewhere_is_not_taken(box):
    """Whole chunks were compared with the manifest; of those that a window cuts through, too."""
    store = Bucket("memory://run/checkpoints")
    values = torch.arange(64.0).reshape(16, 4)
    save({"params": {"w": values}}, store, 1, storage=Storage(database=False, chunk_bytes=64))
    window = {"params": {"w": Window((16, 4), torch.float32, box)}}
    rows, columns = (slice(start, start + length) for start, length in box)
    assert torch.equal(restore(window, store)["params"]["w"], values[rows, columns])
    first, second = (f"global_step_1/model/params.w/c/{i}/0" for i in (0, 1))
    kept, other = store.objects.contents([first, second])
    store.objects.put(first, other)
    with pytest.raises(DamagedCheckpoint, match=r"leaf 'params.w' in .*/model is damaged: chunk 0 has the CRC-32C"):
        restore(window, store)
    store.objects.put(first, kept)
    assert torch.equal(restore(window, store)["params"]["w"], values[rows, columns])


def test_a_store_that_takes_connections_and_says_nothing_is_named(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = {"endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}", "aws_region": "us-east-1"}
        store = Bucket("s3://runs/one", options, patience=0.5)
        for use in (steps, latest, lambda store: save(training_state(1), store, 1)):
            with pytest.raises(TimeoutError, match=r"s3://runs/one/.*: the store has not answered for 0.5 s: look at"):
                use(store)
