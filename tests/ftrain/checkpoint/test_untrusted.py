"""A checkpoint may come from anybody: whatever its files say, it is read as it was written, or refused by name."""

import hashlib
import json
import os
import shutil

import pytest
import tensorstore as ts
import torch
from crc32c import crc32c

from ftrain.checkpoint import DamagedCheckpoint, Storage, latest, manifest, restore, save, steps
from ftrain.checkpoint.extents import unpacked_bytes
from ftrain.hf.stream import SavedArrays
from tests.helpers.checkpoint_states import same_bits, training_state

FILES = Storage(database=False)


def edit(root, change, step=1):
    """Change the manifest's content, and give it a right digest: an attacker can."""
    file = root / f"global_step_{step}" / "manifest.json"
    body = json.loads(file.read_text())
    del body["sha256"]
    change(body)
    file.write_text(manifest._canonical({**body, "sha256": manifest._digest(body)}))


def put(path, value):
    """A change that sets the entry at a path; `...` removes it."""

    def change(body):
        *way, last = path
        for name in way:
            body = body[name]
        if value is ...:
            del body[last]
        else:
            body[last] = value

    return change


A = ("arrays", "params.embed_VD")
TABLES = ("arrays", "scalars", "metrics", "files")
ODD_NAMES = ("model/../../x", "/etc/x", "model//x")
ODD_RECORDS = (5, {"bytes": -1, "sha256": None}, {"bytes": 1})
ODD_SUMS = ([], None, {"params.embed_VD": [1, 2]}, {"params.embed_VD": ["1"]})
CHANGES = [
    *(
        (put([name], value), name)
        for name in ("arrays", "scalars", "metrics", "files")
        for value in (None, [], "x", ...)
    ),
    *((put([name], value), name) for name in ("database", "checksum", "good") for value in (None, "x", 1)),
    *((put(["version"], value), "version") for value in (None, "1", -3, True, ...)),
    *((put(["step"], value), "step") for value in (None, "1", -1, 10**30, ...)),
    *((put(["base"], value), "base") for value in (None, 5, "../global_step_2", "/etc", "a\0b", "x" * 10**5)),
    *((put([*A, "part"], value), "params.embed_VD") for value in ("../x", "", 3, "optimizer", "/etc", "a\0b")),
    *((put([*A, "key"], value), "params.embed_VD") for value in ("../x", "params.other", 3, "a" * 10**5)),
    *((put([*A, "shape"], value), "params.embed_VD") for value in ([-1, 4], [6, "4"], None, [True, 4], [2**62, 4])),
    *((put([*A, "chunk"], value), "params.embed_VD") for value in ([0, 4], [6], [2**40, 4], [6.0, 4], None)),
    *((put([*A, "dtype"], value), "params.embed_VD") for value in ("object", "json", None, "float32\0")),
    *((put([*A, "evil"], value), "evil") for value in (1,)),
    *(
        (put(["scalars", "step"], value), "scalars.step")
        for value in ([1], None, {"float": "x"}, {"float": [1]}, 2**63, 10**400)
    ),
    *(
        (put(["files", name], {"bytes": 3, "sha256": None}), "files")
        for name in ("model/../../x", "/etc/x", "model//x")
    ),
    *(
        (put(["files", "model/x"], value), "files.model/x")
        for value in (5, {"bytes": -1, "sha256": None}, {"bytes": 1})
    ),
    (put(["files", "model/x"], {"bytes": 2**40, "sha256": "0" * 64}), "files.model/x"),
    *((put(["sums"], value), "sums") for value in ODD_SUMS),
    (put(["parameters"], {"a": {"shape": 5, "axes": []}}), "parameters.a"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_a_manifest_of_another_shape_is_refused_by_its_entry(tmp_path, change, named):
    save(training_state(1), tmp_path, 1)
    edit(tmp_path, change)
    with pytest.raises(DamagedCheckpoint, match=rf"global_step_1/manifest.json .*{named}"):
        restore(training_state(), tmp_path)
    assert latest(tmp_path) == 1
    save(training_state(2), tmp_path, 2)
    assert same_bits(restore(training_state(), tmp_path), training_state(2))


@pytest.mark.parametrize("content", [b"[1]", b"null", b'"text"', b"5", b"{}", b"[[" + b"1," * 9 + b"1]]"])
def test_a_manifest_that_is_no_object_is_said_to_be_none(tmp_path, content):
    save(training_state(1), tmp_path, 1)
    (tmp_path / "global_step_1" / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"manifest.json is damaged \(it is no object with a 'sha256'\)"):
        restore(training_state(), tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"9" * 10_000]
)
def test_a_manifest_that_is_none(tmp_path, content):
    save(training_state(1), tmp_path, 1)
    (tmp_path / "global_step_1" / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"global_step_1/manifest.json is damaged"):
        restore(training_state(), tmp_path)


def test_a_step_under_another_number(tmp_path):
    save(training_state(1), tmp_path, 1)
    (tmp_path / "global_step_1").rename(tmp_path / "global_step_7")
    with pytest.raises(DamagedCheckpoint, match="is that of step 1, not of step 7"):
        restore(training_state(), tmp_path, 7)


@pytest.mark.parametrize("name", ["global_step_007", "global_step_٣", "global_step_" + "9" * 200, "global_step_-1"])
def test_names_that_are_no_steps(tmp_path, name):
    save(training_state(1), tmp_path, 1)
    shutil.copytree(tmp_path / "global_step_1", tmp_path / name)
    assert steps(tmp_path) == [1]


def chunk(root, step, leaf, store="0/0"):
    return root / f"global_step_{step}" / "model" / f"params.{leaf}" / "c" / store


def test_a_whole_chunk_from_elsewhere_is_not_taken(tmp_path):
    """Of another step, or of another place; it carries a checksum of its own. Small files have a hash besides."""
    for step in (1, 2):
        state = {"params": {"a": torch.randn(600, 1000), "b": torch.randn(600, 1000)}}
        save(state, tmp_path, step, storage=Storage(database=False, chunk_bytes=2**21))
    good = chunk(tmp_path, 1, "a").read_bytes()
    for other in (chunk(tmp_path, 2, "a"), chunk(tmp_path, 1, "a", "1/0"), chunk(tmp_path, 1, "b")):
        shutil.copy(other, chunk(tmp_path, 1, "a"))
        with pytest.raises(DamagedCheckpoint, match=r"leaf 'params.a' in .* is damaged: chunk \[0, 0\] has the CRC"):
            restore(state, tmp_path, 1)
    chunk(tmp_path, 1, "a").write_bytes(good)
    restore(state, tmp_path, 1)


@pytest.mark.parametrize("target", ["../../../../../secret", "/dev/zero", "0"])
def test_links_in_a_checkpoint_are_not_followed(tmp_path, target):
    (tmp_path / "secret").write_text("key " * 24)
    save(training_state(1), tmp_path / "run", 1, storage=FILES)
    file = chunk(tmp_path / "run", 1, "embed_VD")
    file.rename(file.with_name("real"))
    file.symlink_to(target)
    with pytest.raises(DamagedCheckpoint, match=r"embed_VD/c/0/0 is a link, not a regular file"):
        restore(training_state(), tmp_path / "run")
    edit(tmp_path / "run", put(["files", "model/params.embed_VD/c/0/0"], ...))
    with pytest.raises(DamagedCheckpoint, match=r"embed_VD/c/0/0 is a link, not a regular file"):
        restore(training_state(), tmp_path / "run")


@pytest.mark.parametrize("name", ["model/manifest.ocdbt", "manifest.json", "latest_checkpointed_iteration.txt"])
def test_a_pipe_holds_nobody_up(tmp_path, name):
    save(training_state(1), tmp_path, 1)
    file = tmp_path / name if name.startswith("latest") else tmp_path / "global_step_1" / name
    file.unlink()
    os.mkfifo(file)
    if name.startswith("latest"):
        assert latest(tmp_path) == 1
    else:
        with pytest.raises(ValueError, match=r"is a pipe, not a regular file|holds no checkpoint"):
            restore(training_state(), tmp_path)


def one_value(root, *, value_prefix="d/", packed=None, values=1, size=200):
    """A checkpoint of one leaf, whose database an attacker has written: values where he likes, packed at will."""
    state = {"blob": torch.zeros(size, dtype=torch.uint8)}
    save(state, root, 1, storage=Storage(checksum=False))
    part = root / "global_step_1" / "extra_state"
    shutil.rmtree(part)
    part.mkdir()
    base = {"driver": "file", "path": f"{part}/"}
    config = {"max_inline_value_bytes": 2**20, "max_decoded_node_bytes": 2**31 - 1, "compression": packed}
    if values == 1:
        config["max_inline_value_bytes"] = 10
    store = ts.KvStore.open(
        {"driver": "ocdbt", "base": base, "config": config, "value_data_prefix": value_prefix}
    ).result()
    with ts.Transaction(atomic=True) as transaction:
        for i in range(values):
            key = "blob/c/0" if values == 1 else f"blob{i:05d}"
            store.with_transaction(transaction).write(key, bytes(size if values == 1 else 2**20)).result()
    files = {f"extra_state/{p.relative_to(part)}": {"bytes": p.stat().st_size, "sha256": None}
             for p in part.rglob("*") if p.is_file()}  # fmt: skip
    edit(root, lambda body: body.update(files=files))
    return state, part


def rename_values(part, old, new):
    """Let the tree call its values otherwise, and set its checksums right."""
    for file in (p for p in part.rglob("*") if p.is_file()):
        data = bytearray(file.read_bytes().replace(old.encode(), new.encode()))
        at = 0
        while (at := data.find(b"\x0c\xdb", at)) >= 0:
            length = int.from_bytes(data[at + 4 : at + 12], "little")
            if 16 < length <= len(data) - at:
                data[at + length - 4 : at + length] = crc32c(bytes(data[at : at + length - 4])).to_bytes(4, "little")
                at += length - 1
            at += 1
        file.write_bytes(bytes(data))


@pytest.mark.parametrize("target", ["../../../../secret/", "../../../../secret///////////"])
def test_a_database_that_points_at_the_reader_s_own_files(tmp_path, target):
    prefix = "V" * len(target)
    state, part = one_value(tmp_path / "run", value_prefix=prefix)
    (name,) = (p.name for p in part.rglob("*") if prefix in p.name)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / name.removeprefix(prefix)).write_bytes(b"key " * 50)
    rename_values(part, prefix, target)
    with pytest.raises(
        DamagedCheckpoint, match=r"leaf 'blob' .*it refers to '\.\./.*', which is no file of this checkp"
    ):
        restore(state, tmp_path / "run")


def test_a_few_bytes_that_unpack_to_very_many_are_not_unpacked(tmp_path):
    state, part = one_value(tmp_path, packed={"id": "zstd"}, values=80)
    packed = sum(p.stat().st_size for p in part.rglob("*") if p.is_file())
    assert packed < 2**17
    with pytest.raises(DamagedCheckpoint, match=r"leaf 'blob' .*unpacks to more than [67]\d,\d{3},\d{3} bytes"):
        restore(state, tmp_path)
    edit(tmp_path, lambda body: body["arrays"].update({"blob.x": {**body["arrays"].pop("blob"), "key": "blob.x"}}))
    with pytest.raises(DamagedCheckpoint, match=r"extra_state is damaged: .*unpacks to more than"):
        SavedArrays(tmp_path, 1, "blob")


@pytest.mark.parametrize("size", [10, 3000, 200_000])
def test_what_a_node_unpacks_to_is_bounded_by_its_blocks(tmp_path, size):
    base = {"driver": "file", "path": f"{tmp_path}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": {"max_inline_value_bytes": 2**20}}).result()
    store.write("k", bytes(range(256)) * (size // 256) + bytes(size % 256)).result()
    nodes = [p.read_bytes() for p in (tmp_path / "d").iterdir()]
    assert all(unpacked_bytes(node) >= size for node in nodes)
    assert all(unpacked_bytes(node) <= size + 2**18 for node in nodes)
    with pytest.raises(ValueError, match="unknown header"):
        unpacked_bytes(b"\x0c\xdb" + bytes(40).replace(b"\0", b"\1"))


def test_the_hash_of_a_manifest_is_of_all_its_entries(tmp_path):
    save(training_state(1), tmp_path, 1)
    body = json.loads((tmp_path / "global_step_1" / "manifest.json").read_text())
    claimed = body.pop("sha256")
    assert claimed == hashlib.sha256(manifest._canonical(body).encode()).hexdigest()
    assert set(body["sums"]) == set(body["arrays"])


def test_an_order_without_a_next_one_holds_up_no_save(tmp_path):
    save(training_state(1), tmp_path, 1)
    edit(tmp_path, put(["order"], 2**63 - 1))
    for step in (2, 3):
        save(training_state(step), tmp_path, step)
        assert latest(tmp_path) == step
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert latest(tmp_path) == 3
    assert same_bits(restore(training_state(), tmp_path), training_state(3))
