"""Saving: files equal to those of safetensors, shards as huggingface_hub splits, and what is refused."""

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ftrain.hf import save_hf
from ftrain.hf.save import HfWriter
from ftrain.hf.shards import Entry, parse_size, split
from ftrain.modules.hf_names import HfTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)


@given(
    kinds=st.dictionaries(
        st.text('abä."\\0', min_size=1, max_size=8), st.tuples(st.sampled_from(DTYPES), st.integers(1, 5)), min_size=1
    )
)
@settings(deadline=None, max_examples=40)
def test_a_file_is_what_safetensors_writes(kinds, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("hf")
    weights = {name: torch.randint(0, 2, (size, 3)).to(dtype) for name, (dtype, size) in kinds.items()}
    paths = {name: f"leaf{i}" for i, name in enumerate(weights)}
    save_hf({paths[n]: weights[n] for n in weights}, folder, {}, [HfTensor(n, paths[n]) for n in weights])
    save_file(weights, folder / "theirs", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (folder / "theirs").read_bytes()


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20), max_shard=st.integers(1, 60))
@settings(deadline=None)
def test_shards_are_split_as_huggingface_hub_does(sizes: list[int], max_shard: int) -> None:
    hub = pytest.importorskip("huggingface_hub")
    weights = {f"w{i}": torch.empty(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    entries = {name: Entry((size,), torch.uint8) for name, size in zip(weights, sizes, strict=True)}
    theirs = hub.split_torch_state_dict_into_shards(weights, max_shard_size=max_shard)
    assert split(entries, max_shard) == list(theirs.filename_to_tensors.values())


def test_a_group_is_one_tensor_for_the_split() -> None:
    entries = {name: Entry((4,), torch.uint8, name[0] if name != "c" else "") for name in ("a0", "b0", "c", "a1", "b1")}
    assert split(entries, 12) == [["a0", "a1"], ["b0", "b1", "c"]]
    assert split(entries, 5) == [["a0", "a1"], ["b0", "b1"], ["c"]]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("40kb", 40_000), ("12", 12), (7, 7)]
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5 GBit", "", "-1", 0, "0.1"])
def test_what_is_no_size_is_refused(text: int | str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_size(text)


PARAMS = {"w": torch.randn(4, 6), "e": torch.randn(2, 3, 5), "n": torch.arange(3)}
NAMES = (
    HfTensor("linear.weight", "w", transposed=True),
    *(HfTensor(f"experts.{e}", "e", index=e) for e in range(2)),
    HfTensor("ids", "n"),
    HfTensor("head", "w", transposed=True, copy=True),
)


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_new_save_replaces_the_weights_of_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors.tmp-0aff").write_text("of a save that was killed")
    save_hf(PARAMS, tmp_path, {"a": 1}, NAMES, max_shard="96")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) == 3
    save_hf(PARAMS, tmp_path, {"a": 2}, NAMES)
    assert names_in(tmp_path) == {"tokenizer.json", "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 2, "dtype": "float32"}
    save_hf(PARAMS, tmp_path, {}, NAMES, max_shard=96)
    assert "model.safetensors" not in names_in(tmp_path)


def test_the_old_name_of_the_dtype_is_kept(tmp_path: Path) -> None:
    save_hf(PARAMS, tmp_path, {"torch_dtype": "float32"}, NAMES, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {"torch_dtype": "bfloat16"}


def test_a_number_beyond_the_dtype_asked_for_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    large = {**PARAMS, "w": torch.full((4, 6), 1e5)}
    save_hf(PARAMS, tmp_path, {}, NAMES, dtype=torch.float16)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"'linear.weight' \(our 'w'\) holds 100000, which torch.float16 cannot hold"):
        save_hf(large, tmp_path, {}, NAMES, dtype=torch.float16)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    save_hf({**PARAMS, "w": torch.full((4, 6), torch.inf)}, tmp_path, {}, NAMES, dtype=torch.float16)
    save_hf(large, tmp_path, {}, NAMES, dtype=torch.bfloat16)


def write_some(folder: Path, leaves: dict[str, torch.Tensor]) -> None:
    entries = {path: Entry(tuple(leaf.shape), leaf.dtype) for path, leaf in PARAMS.items()}
    with HfWriter(folder, {"new": 1}, entries, NAMES) as writer:
        for path, leaf in leaves.items():
            writer.write(path, leaf)


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        ({"n": PARAMS["n"], "w": PARAMS["w"].T}, r"'w' was announced as \[4, 6\] but is \[6, 4\]"),
        ({"n": PARAMS["n"], "w": PARAMS["w"]}, "'e' was announced but not written"),
    ],
)
def test_an_error_on_the_way_leaves_the_folder_as_it_was(leaves: dict, words: str, tmp_path: Path) -> None:
    save_hf(PARAMS, tmp_path, {}, NAMES)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=words):
        write_some(tmp_path, leaves)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_full_disk_is_named_and_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hf(PARAMS, tmp_path, {}, NAMES)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write = os.pwrite

    def full(descriptor: int, data: bytes, at: int) -> int:
        if at > 300:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*model\.safetensors\.tmp-"):
        save_hf(PARAMS, tmp_path, {"new": 1}, NAMES)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "names", "words"),
    [
        ({"x": torch.ones(1)}, NAMES, "'x' has no name in Hugging Face's format"),
        ({}, (*NAMES, HfTensor("y", "gone")), "'y' is our 'gone', which the parameters have not"),
        ({}, NAMES[:2] + NAMES[3:], r"the names take the parts \[0\] of 'e' \[2, 3, 5\]"),
        ({}, (*NAMES, dataclasses.replace(NAMES[1], name="again")), r"the names take the parts \[0, 1, 0\] of 'e'"),
        ({"n": torch.ones(3, dtype=torch.complex64)}, NAMES, "'ids' has dtype torch.complex64"),
    ],
)
def test_trees_that_do_not_fit_are_refused_by_name(change, names, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        save_hf({**PARAMS, **change}, tmp_path, {}, names)
    assert not names_in(tmp_path)


@pytest.mark.parametrize("config", [{"x": {1, 2}}, {"x": float("nan")}, {"x": float("inf")}])
def test_a_configuration_that_is_no_json_is_refused_before_anything_is_replaced(tmp_path: Path, config: dict) -> None:
    names = [HfTensor("w", "w")]
    save_hf({"w": torch.zeros(3)}, tmp_path, {}, names)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="the configuration cannot be written as JSON"):
        save_hf({"w": torch.ones(3)}, tmp_path, config, names)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.safetensors"])
def test_a_folder_in_the_way_is_named_before_anything_is_replaced(tmp_path: Path, name: str) -> None:
    names = [HfTensor("w", "w")]
    save_hf({"w": torch.zeros(3)}, tmp_path, {}, names)
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path / name} is a folder, where a file is to be written: remove it"):
        save_hf({"w": torch.ones(3)}, tmp_path, {}, names)
    if name != "model.safetensors":
        assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize("size", [1.5, None, True, float("nan"), "1e3"])
def test_what_is_no_number_of_bytes_is_refused(size: object) -> None:
    with pytest.raises(ValueError, match="a size is a number of bytes or a text like '5GB' or '500MiB', not"):
        parse_size(size)  # type: ignore[arg-type]
