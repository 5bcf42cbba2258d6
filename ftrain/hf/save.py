"""From a tree of parameters to a folder in Hugging Face's format: safetensors, their index, `config.json`."""

import dataclasses
import json
import math
import os
import re
import types
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ftrain.checkpoint.durable import make_folder, sync_path, write_bytes, write_text
from ftrain.checkpoint.folders import temporary
from ftrain.hf.files import CONFIG
from ftrain.hf.gather import Leaves, write_gathered
from ftrain.hf.load import hf_shape, part_of_leaf, row_dim
from ftrain.hf.range import require_in_range
from ftrain.hf.shards import TRANSFORMERS, Entry, Form, ShardFile, cast_dtype, index_text, lay_out, parse_size
from ftrain.modules.hf_names import HfTensor
from ftrain.modules.spec import leaves_with_paths


def save_hf(
    params: Any,
    folder: str | Path,
    config: Mapping[str, Any],
    names: Iterable[HfTensor],
    *,
    max_shard: int | str = "5GB",
    dtype: torch.dtype | None = None,
    form: Form = TRANSFORMERS,
    beside: Mapping[str, bytes] = types.MappingProxyType({}),
) -> None:
    """Write a tree of parameters as `save_pretrained` of transformers would: the same files, equal to the byte.

    Beyond the parameters, one tensor is in memory. Files get their names when they are complete and on the disk, and
    the index and `config.json` come last.

    On a mesh of processes every rank calls it, for parameters that are spread over ranks: they are gathered one by one,
    rank 0 writes, and all return when it is done. (A checkpoint that is there can be converted without a run:
    `ftrain convert`.)

    Args:
        params: tensors on any device, or DTensors.
        folder: made if need be. Weights that are there already are replaced.
        config: the content of `config.json`; its `dtype` becomes that of the weights.
        names: which leaf is which tensor, in the order of the files (see `ftrain.modules.hf_names`).
        max_shard: the largest file, in bytes or as "5GB"; only a single larger tensor makes a larger one.
        dtype: cast floating-point weights to it. Default: as they are.
        form: of another library's folders (`ftrain.hf.shards.DIFFUSERS`), which are equal to the byte too.
        beside: other files of the folder by name, such as `generation_config.json`, written after the weights.

    Raises:
        ValueError: a leaf has no name or a name no leaf, or a dtype that the format has not; a number is beyond the
            range of `dtype`; `config` is no JSON of finite numbers; `max_shard` is no size; a folder has the name of a
            file. What was there before is unchanged.
        OSError: the disk is full, the folder is read-only, ...
        RuntimeError: on other ranks than 0, when rank 0 could not write.

    >>> import os, tempfile, torch
    >>> from ftrain.hf import save_hf
    >>> from ftrain.modules.hf_names import HfTensor
    >>> folder = tempfile.mkdtemp()
    >>> names = [HfTensor("model.norm.weight", "norm.weight_D")]
    >>> save_hf({"norm": {"weight_D": torch.ones(4)}}, folder, {"model_type": "llama"}, names)
    >>> sorted(os.listdir(folder))
    ['config.json', 'model.safetensors']
    """
    leaves = dict(leaves_with_paths(params))
    names = tuple(names)
    described = {path: Entry(tuple(leaf.shape), cast_dtype(leaf.dtype, dtype)) for path, leaf in leaves.items()}
    writer = HfWriter(folder, config, described, names, max_shard=max_shard, form=form)

    def write(whole: Leaves) -> None:
        with writer:
            for path, leaf in whole:
                writer.write(path, leaf)
        for name, content in beside.items():
            write_bytes(Path(folder) / name, content)

    write_gathered(leaves, write)


class HfWriter:
    """Writes a folder leaf by leaf, in any order, each as soon as it is at hand.

        with HfWriter(folder, config, entries, names) as writer:
            for path in entries:
                writer.write(path, the_leaf_at(path))

    Leaving the block without an error gives the files their names; with one, nothing of the folder has changed.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any],
        entries: Mapping[str, Entry],
        names: Iterable[HfTensor],
        *,
        max_shard: int | str = "5GB",
        form: Form = TRANSFORMERS,
    ) -> None:
        """Nothing is touched before `with`.

        Args:
            entries: shape and dtype of every leaf, by path, as they are to be written.
            folder, config, names, max_shard, form: as for `save_hf`.

        Raises:
            ValueError: as `save_hf`.
        """
        written = [name for name in names if not name.copy or name.written]
        _check([name for name in written if not name.copy], entries)
        self._folder = Path(folder)
        self._entries = dict(entries)
        self._tensors = {n.name: _entry(n, entries[n.leaf]) for n in written}
        self._form = form
        self._files = lay_out(self._tensors, parse_size(max_shard), form)
        self._file_of = {name: file for file in self._files for name in file.offsets}
        self._of_leaf: dict[str, list[HfTensor]] = {}
        for name in sorted(written, key=lambda name: name.copy):
            self._of_leaf.setdefault(name.leaf, []).append(name)
        self._config = _json(_with_dtype(config, entries) if form.tells_dtype else config)
        self._missing = {path: math.prod(entry.shape) for path, entry in entries.items()}
        self._open: dict[str, FileIO] = {}

    def __enter__(self) -> "HfWriter":
        make_folder(self._folder)
        for name in (self._form.index, CONFIG, *(file.name for file in self._files)):
            if (self._folder / name).is_dir():
                raise ValueError(f"{self._folder / name} is a folder, where a file is to be written: remove it")
        try:
            for file in self._files:
                self._begin(file)
        except BaseException:
            self._discard()
            raise
        return self

    def dim(self, path: str) -> int:
        """The dim along which the leaf at `path` may be written range by range."""
        return row_dim(self._of_leaf[path][0], len(self._entries[path].shape))

    def write(self, path: str, values: Tensor, *, start: int = 0) -> None:
        """Write the leaf at `path`, cast to the dtype that was announced; or of a large one only the range of
        `self.dim(path)` that begins at `start`, its other dims being whole.

        Raises:
            ValueError: the values have another shape than was announced, or a number beyond the range of the dtype.
            OSError: the disk is full, ...; the file is named.
        """
        entry, names = self._entries[path], self._of_leaf[path]
        self._check_range(path, values, start)
        offset = start * math.prod(hf_shape(names[0], entry.shape)[1:]) * entry.dtype.itemsize
        for name in names:
            if name.index is None:
                self._put(name, part_of_leaf(name, values), offset)
            elif start <= name.index < start + values.shape[0]:
                self._put(name, part_of_leaf(dataclasses.replace(name, index=name.index - start), values), 0)
        self._missing[path] -= values.numel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            missing = sorted(path for path, numbers in self._missing.items() if numbers)
            if kind is None and missing:
                raise ValueError(f"{missing[0]!r} was announced but not written, or not all of it")
            if kind is None:
                self._publish()
        finally:
            self._discard()

    def _check_range(self, path: str, values: Tensor, start: int) -> None:
        shape = list(self._entries[path].shape)
        expected = list(shape)
        if shape:
            dim = self.dim(path)
            fits = start >= 0 and values.ndim == len(shape) and start + values.shape[dim] <= shape[dim]
            expected[dim] = values.shape[dim] if fits else shape[dim]
        if list(values.shape) != expected:
            raise ValueError(f"{path!r} was announced as {shape} but is {list(values.shape)} (from {start} on)")

    def _put(self, name: HfTensor, values: Tensor, offset: int) -> None:
        file, dtype = self._file_of[name.name], self._tensors[name.name].dtype
        cast = values.to("cpu", dtype)
        require_in_range(values, cast, f"{name.name!r} (our {name.leaf!r})")
        data = cast.contiguous().flatten().view(torch.uint8).numpy().data
        _write_all(self._open[file.name], data, file.offsets[name.name] + offset)

    def _begin(self, file: ShardFile) -> None:
        made = self._open[file.name] = FileIO(temporary(self._folder / file.name), "xb")
        made.truncate(file.nbytes)
        _write_all(made, memoryview(file.header), 0)

    def _publish(self) -> None:
        for made in self._open.values():
            os.fsync(made.fileno())
        for title, made in self._open.items():
            os.replace(str(made.name), self._folder / title)
        # what an earlier save has left, finished or (after a crash) not
        left = re.compile(rf"{self._form.stem}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.tmp-[0-9a-f]+)?")
        for old in self._folder.iterdir():
            if left.fullmatch(old.name) and old.name not in self._open:
                old.unlink()
        if len(self._files) > 1:
            write_text(self._folder / self._form.index, index_text(self._files, self._tensors, self._form))
        else:
            (self._folder / self._form.index).unlink(missing_ok=True)
        write_text(self._folder / CONFIG, self._config)
        sync_path(self._folder)

    def _discard(self) -> None:
        """Close the files, and remove those that did not get their names."""
        for made in self._open.values():
            made.close()
            Path(str(made.name)).unlink(missing_ok=True)
        self._open = {}


def _write_all(file: FileIO, data: memoryview, at: int) -> None:
    try:
        while data:
            done = os.pwrite(file.fileno(), data, at)
            data, at = data[done:], at + done
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from error


def _check(names: list[HfTensor], entries: Mapping[str, Entry]) -> None:
    """Names and leaves fit one to one; of a stacked leaf, all entries of its first dim are named."""
    parts: dict[str, list[int | None]] = {path: [] for path in entries}
    for name in names:
        if name.leaf not in parts:
            raise ValueError(
                f"{name.name!r} is our {name.leaf!r}, which the parameters have not: a tree of this model?"
            )
        parts[name.leaf].append(name.index)
    for path, indices in parts.items():
        if not indices:
            raise ValueError(f"{path!r} has no name in Hugging Face's format: leave it out, or add it to the names")
        shape = entries[path].shape
        if indices != [None] and sorted(i for i in indices if i is not None) != list(range(shape[0])):
            raise ValueError(f"the names take the parts {indices} of {path!r} {list(shape)}: each must be taken once")


def _entry(name: HfTensor, leaf: Entry) -> Entry:
    """transformers, too, has experts stacked in memory, and writes what shares memory into one file."""
    return Entry(hf_shape(name, leaf.shape), leaf.dtype, "" if name.index is None else name.leaf)


def _json(config: Mapping[str, Any]) -> str:
    try:
        return json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the configuration cannot be written as JSON ({error}): give plain finite values") from error


def _with_dtype(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The configuration with the dtype of most of the weights (called `torch_dtype` before transformers 4.56)."""
    sizes: dict[torch.dtype, int] = {}
    for entry in entries.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    if not sizes:
        return dict(config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")}
