"""How tensors are laid out in safetensors files: into which file each goes, and where in it, before any is written."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ftrain.hf.files import DTYPES, STEM

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANK = {dtype: i for i, dtype in enumerate(DTYPES.values())}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Form:
    """What a library's folders look like: the `stem` of their files of weights, whether `config.json` tells their dtype
    (`tells_dtype`), and whether the index counts parameters (`counts`).
    """

    stem: str = STEM
    tells_dtype: bool = True
    counts: bool = True

    @property
    def single(self) -> str:
        """The file, where there is one."""
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        """The index of several."""
        return f"{self.single}.index.json"


TRANSFORMERS = Form()
DIFFUSERS = Form("diffusion_pytorch_model", tells_dtype=False, counts=False)


@dataclass(frozen=True)
class Entry:
    """Shape and dtype of a tensor to be written; tensors of one `group` (unless it is empty) share a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: str = ""

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardFile:
    """One file: its `header` (length included), where each tensor begins (from the start of the file), its size."""

    name: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def cast_dtype(own: torch.dtype, to: torch.dtype | None) -> torch.dtype:
    """`to` for floating-point weights; others, or without a `to`, keep their own."""
    return to if to is not None and own.is_floating_point else own


def parse_size(size: int | str) -> int:
    """Bytes: a whole number, or text like "5GB" (powers of 1000) or "5GiB" (powers of 1024).

    Raises:
        ValueError: it is none of these, or less than 1.

    >>> from ftrain.hf.shards import parse_size
    >>> parse_size("5GB"), parse_size("1.5 KiB"), parse_size(100)
    (5000000000, 1536, 100)
    """
    if isinstance(size, int) and not isinstance(size, bool):
        found: float = size
    else:
        given = size.upper() if isinstance(size, str) else ""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", given)
        if match is None:
            raise ValueError(f"a size is a number of bytes or a text like '5GB' or '500MiB', not {size!r}")
        found = float(match[1]) * _UNITS[match[2] or ""]
    if found < 1:
        raise ValueError(f"a file needs room for at least one byte, got {size!r}")
    return int(found)


def split(entries: Mapping[str, Entry], max_shard: int) -> list[list[str]]:
    """The names that go into each file, in order: the rule of huggingface_hub's `split_torch_state_dict_into_shards`.

    A file is closed when the next tensor would make it larger than `max_shard` bytes. A tensor that is larger by itself
    gets a file of its own, and the file that was open before it goes on. A group counts as one tensor.
    """
    groups: dict[str, list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault(entry.group or name, []).append(name)
    shards: list[list[str]] = []
    current: list[str] = []
    room = max_shard
    for names in groups.values():
        nbytes = sum(entries[name].nbytes for name in names)
        if nbytes > max_shard:
            shards.append(names)
            continue
        if nbytes > room:
            shards.append(current)
            current, room = [], max_shard
        current += names
        room -= nbytes
    return [*shards, current] if current else shards


def lay_out(entries: Mapping[str, Entry], max_shard: int, form: Form = TRANSFORMERS) -> list[ShardFile]:
    """The files that hold these tensors, in the order given: `model.safetensors`, or shards numbered as there.

    Args:
        entries: shape and dtype of each tensor, by its name in the files.
        max_shard: bytes of the largest file; only a single larger tensor makes a larger one.
        form: of whose folder, for the names of the files.

    Raises:
        ValueError: safetensors has not the dtype of a tensor, which is named.

    >>> import torch
    >>> from ftrain.hf.shards import Entry, lay_out
    >>> entries = {name: Entry((256,), torch.float32) for name in ("a", "b", "c")}  # 1024 bytes each
    >>> [(file.name, list(file.offsets)) for file in lay_out(entries, max_shard=2048)]
    [('model-00001-of-00002.safetensors', ['a', 'b']), ('model-00002-of-00002.safetensors', ['c'])]
    """
    shards = split(entries, max_shard)
    count = len(shards)
    several = [f"{form.stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    titles = [form.single] if count == 1 else several
    return [_file(title, {n: entries[n] for n in names}) for title, names in zip(titles, shards, strict=True)]


def index_text(files: list[ShardFile], entries: Mapping[str, Entry], form: Form = TRANSFORMERS) -> str:
    """The text of the index of several files, as the library of this form writes it."""
    total = {"total_size": sum(entry.nbytes for entry in entries.values())}
    if form.counts:
        total["total_parameters"] = sum(math.prod(entry.shape) for entry in entries.values())
    weights = {name: file.name for file in files for name in file.offsets}
    return json.dumps({"metadata": total, "weight_map": weights}, indent=2, sort_keys=True) + "\n"


def _file(title: str, entries: Mapping[str, Entry]) -> ShardFile:
    """The layout of safetensors' own writer: widest dtypes first, then by name; the header filled up to 8 bytes."""
    body: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    at = 0
    for name in sorted(entries, key=lambda n: (-_rank(n, entries[n].dtype), n.encode())):
        entry = entries[name]
        body[name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        begins[name] = at
        at += entry.nbytes
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return ShardFile(title, header, {n: len(header) + begin for n, begin in begins.items()}, len(header) + at)


def _rank(name: str, dtype: torch.dtype) -> int:
    if dtype not in _RANK:
        known = ", ".join(str(d).removeprefix("torch.") for d in _RANK)
        raise ValueError(f"{name!r} has dtype {dtype}, which safetensors cannot hold here; possible: {known}")
    return _RANK[dtype]
