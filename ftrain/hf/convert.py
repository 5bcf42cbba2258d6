"""From a folder in Hugging Face's format to a checkpoint, and back, in little memory: `ftrain convert`."""

import ctypes
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ftrain.checkpoint.ages import latest
from ftrain.checkpoint.dtypes import DTYPES
from ftrain.checkpoint.durable import write_bytes
from ftrain.checkpoint.folders import step_folder, step_number
from ftrain.checkpoint.local import LocalFolder
from ftrain.checkpoint.open_store import StoreLike, open_store
from ftrain.checkpoint.store import Store
from ftrain.files.beneath import kind_of
from ftrain.files.outside import JSON_BYTES
from ftrain.hf.described import described_decoder
from ftrain.hf.files import CONFIG, HfFolder, parse_json, read_json, read_member
from ftrain.hf.load import check_fit, read_parts, stored_dtypes
from ftrain.hf.save import HfWriter
from ftrain.hf.shards import Entry, cast_dtype, parse_size
from ftrain.hf.stream import Group, Range, SavedArrays, groups, save_stream
from ftrain.modules import decoder
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.hf_names import HfTensor, decoder_names
from ftrain.modules.spec import ParamSpec, leaves_with_paths

ASSETS = "model_assets"  # beside the steps, as in VeOmni: config.json, the tokenizer
_ASSET_FOLDERS = ("", "additional_chat_templates")  # of a model's folder; the second is transformers' CHAT_TEMPLATE_DIR
_ASSET_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
_ASSET_BYTES = 2**28
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Convert:
    """Convert weights between Hugging Face's format and checkpoints, in memory that does not grow with the model.

    Either --from-hf DIR --to DIR, or --from-ckpt DIR [--to-hf DIR]. Checkpoints may be in a bucket (s3://, gs://).
    """

    from_hf: Path | None = None
    """A folder with config.json and safetensors."""
    to: str | None = None
    """With --from-hf: the folder or URL of checkpoints; it gets global_step_N, and the small files in model_assets."""
    from_ckpt: str | None = None
    """A folder or URL of checkpoints, which holds global_step_N."""
    to_hf: Path | None = None
    """With --from-ckpt: the folder to write. Default: hf_ckpt in the step's own folder."""
    step: int | None = None
    """The step to read (default: the latest), or to write (default: 0)."""
    config: Path | None = None
    """With --from-ckpt: the config.json of the model. Default: model_assets/config.json beside the steps."""
    params: str = "params"
    """The path of the model's parameters in the state, as "params.foundation" or "extra.average"."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Cast floating-point weights. Default: as they are."""
    max_shard: str = "5GB"
    """With --from-ckpt: the largest file."""


def run(options: Convert) -> int:
    """The subcommand; the exit code. Raises `ValueError` for options and folders that do not fit."""
    o = options
    _give_freed_memory_back()
    dtype = None if o.dtype is None else DTYPES[o.dtype]
    if o.from_hf is not None and o.to is not None and o.from_ckpt is None and o.to_hf is None:
        step = 0 if o.step is None else o.step
        hf_to_checkpoint(o.from_hf, o.to, step=step, params=o.params, dtype=dtype)
        print(f"wrote step {step} of {o.to}")
    elif o.from_ckpt is not None and o.from_hf is None and o.to is None:
        made = checkpoint_to_hf(
            o.from_ckpt,
            o.to_hf,
            step=o.step,
            params=o.params,
            dtype=dtype,
            config=o.config,
            max_shard=o.max_shard,
        )
        print(f"wrote {made}")
    else:
        raise ValueError("convert needs either --from-hf DIR --to DIR or --from-ckpt DIR [--to-hf DIR]")
    return 0


def hf_to_checkpoint(
    folder: Path, root: StoreLike, *, step: int = 0, params: str = "params", dtype: torch.dtype | None = None
) -> None:
    """Write the decoder in `folder` as step `step` of the checkpoints in `root`, its parameters at path `params`.

    `ftrain.checkpoint.restore({"params": abstract}, root, step)` reads it. The dtypes are those of the files, or
    `dtype` for floating-point weights. `config.json`, the tokenizer and such are copied to `root/model_assets`.

    Args:
        folder: with `config.json` and safetensors.
        root: the folder, URL or store of checkpoints.
        step: which step is written; one that exists is replaced.
        params: the dotted path of the parameters in the state.
        dtype: cast floating-point weights to it.

    Raises:
        ValueError: the folder is not that of a decoder we have (see `decoder_config`, `load_hf`), a link in it leads
            elsewhere, or another run writes into `root`.
        OSError: the disk is full, ...; `root` is as it was.

    >>> import ftrain, pathlib, tempfile
    >>> from ftrain.checkpoint import steps
    >>> from ftrain.hf import checkpoint_to_hf, hf_to_checkpoint, save_hf
    >>> from ftrain.modules import decoder
    >>> from ftrain.modules.hf_config import hf_config
    >>> from ftrain.modules.hf_names import decoder_names
    >>> cfg, work = decoder.preset("llama-tiny"), pathlib.Path(tempfile.mkdtemp())
    >>> params = ftrain.init(decoder.specs(cfg), ftrain.key(0))
    >>> save_hf(params, work / "hf", hf_config(cfg), decoder_names(cfg))
    >>> hf_to_checkpoint(work / "hf", work / "run")
    >>> steps(work / "run")
    [0]
    >>> made = checkpoint_to_hf(work / "run", work / "again")
    >>> (made / "model.safetensors").read_bytes() == (work / "hf" / "model.safetensors").read_bytes()
    True
    """
    here = HfFolder.open(folder)
    cfg = described_decoder(here.config(), str(folder / CONFIG), layers=len(here.tensors), experts=len(here.tensors))
    _require_no_more(cfg, here)
    names = decoder_names(cfg)
    specs = decoder.specs(cfg)
    wanted = {path: Entry(spec.shape, spec.dtype) for path, spec in leaves_with_paths(specs)}
    check_fit(here, wanted, names)
    wanted |= {p: Entry(wanted[p].shape, cast_dtype(own, dtype)) for p, own in stored_dtypes(here, names).items()}
    order = _by_file(here, wanted, names)
    leaves = {f"{params}.{p}": torch.empty(wanted[p].shape, dtype=wanted[p].dtype, device="meta") for p in order}

    def produce(group: Group) -> Mapping[str, Tensor]:
        own = {path.removeprefix(f"{params}."): part for path, part in group.items()}
        parts = {path: part.box(wanted[path].shape) for path, part in own.items()}
        return {f"{params}.{p}": t for p, t in read_parts(here, wanted, names, parts).items()}

    assets = _read_assets(here.path)
    largest = max(file.stat().st_size for file in {stored.file for stored in here.tensors.values()})
    store = open_store(root)
    save_stream(store, step, leaves, produce, limit=_part_bytes(largest), specs=specs)
    for name, content in assets.items():
        store.write(f"{ASSETS}/{name}", content)


def checkpoint_to_hf(
    root: StoreLike,
    folder: Path | None = None,
    *,
    step: int | None = None,
    params: str = "params",
    dtype: torch.dtype | None = None,
    config: Path | None = None,
    max_shard: int | str = "5GB",
) -> Path:
    """Write the decoder whose parameters are at path `params` of a saved state in Hugging Face's format.

    `folder`: where to; default `hf_ckpt` in the step's folder. `step`: default the latest. `config`: the `config.json`
    of the model; default `root/model_assets/config.json`, whose neighbours (the tokenizer) are then copied too. The
    folder that was written is returned.

    `params`, `dtype`: as for `hf_to_checkpoint`; `max_shard`: the largest file, as for `save_hf`.

    Raises:
        ValueError: there is no such step, the configuration and the saved leaves do not fit, or the step's `hf_ckpt`
            is a link.
        DamagedCheckpoint: a file of the step is missing or was changed; it is named.
        OSError: the disk is full, ...
    """
    store = open_store(root)
    described = _saved_config(store) if config is None else read_json(config)
    step = latest(store) if step is None else step_number(step)
    if step is None:
        raise ValueError(f"{store.show()} holds no checkpoint: it has no folder global_step_N with a manifest")
    shown = store.show(f"{ASSETS}/{CONFIG}") if config is None else str(config)
    with SavedArrays(store, step, params) as saved:
        largest = max((size for leaf in saved.arrays.values() for size in leaf.shape), default=0)
        cfg = described_decoder(described, shown, layers=len(saved.arrays), experts=largest)
        names = decoder_names(cfg)
        folder = _own_folder(store, step) if folder is None else folder
        stored = _stored(saved, f"step {step} of {store.show()}", params, dict(leaves_with_paths(decoder.specs(cfg))))
        entries = {path: Entry(leaf.shape, cast_dtype(leaf.dtype, dtype)) for path, leaf in stored.items()}
        with HfWriter(folder, described, entries, names, max_shard=max_shard) as writer:
            for group in _parts_to_write(saved, params, writer, stored, _part_bytes(parse_size(max_shard))):
                for path, values in saved.read(group).items():
                    writer.write(path.removeprefix(f"{params}."), values, start=group[path].start)
    if config is None:
        _copy_assets(store, folder)
    return folder


def _saved_config(store: Store) -> dict[str, Any]:
    name = f"{ASSETS}/{CONFIG}"
    try:
        return parse_json(store.read(name, limit=JSON_BYTES), store.show(name))
    except FileNotFoundError:
        raise ValueError(f"{store.show(name)} is missing: give the config.json of the model with --config") from None


def _own_folder(store: Store, step: int) -> Path:
    """`hf_ckpt` of the step: a name in a folder that may come from anybody, so no link is followed."""
    if not isinstance(store, LocalFolder):
        raise ValueError(f"{store.show()} is in no file system of this machine: say where to write with --to-hf DIR")
    folder = step_folder(store.root, step) / "hf_ckpt"
    _require_folder(folder)
    return folder


def _require_folder(folder: Path) -> None:
    """ValueError if something else than a folder has this name."""
    if os.path.lexists(folder) and not stat.S_ISDIR(folder.lstat().st_mode):
        kind = kind_of(folder.lstat().st_mode)
        raise ValueError(f"{folder} is {kind}, not a folder: remove it, or say where to write with --to-hf DIR")


def _give_freed_memory_back() -> None:
    """Let blocks of 1 MiB and more go back to the system when they are freed, for the rest of the process.

    glibc raises that size by itself, to 32 MiB, and keeps what is smaller for each thread: with the threads of
    tensorstore that is more than the conversion needs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)


def _part_bytes(file_bytes: int) -> int:
    """How many bytes to hold at once: a quarter of a file, but no crumbs, and no more than pays."""
    return min(2**28, max(2**23, file_bytes // 4))


def _parts_to_write(
    saved: SavedArrays, params: str, writer: HfWriter, stored: Mapping[str, Entry], limit: int
) -> Iterator[Group]:
    """Ranges of bytes of the files, and where that is one dim with the chunks', whole chunks."""
    shapes, items, grain = {}, {}, {}
    for own, leaf in stored.items():
        path = f"{params}.{own}"
        dim, chunk = writer.dim(own), saved.arrays[path].chunk
        shapes[path], items[path] = leaf.shape, leaf.dtype.itemsize
        grain[path] = Range(dim, 0, chunk[dim] if chunk and dim == 0 else 1)
    return groups(shapes, items, grain, limit)


def _stored(saved: SavedArrays, shown: str, params: str, specs: Mapping[str, ParamSpec]) -> dict[str, Entry]:
    """Shape and dtype of the saved leaves below `params`, which must be those of the specs."""
    here = {path.removeprefix(f"{params}."): leaf for path, leaf in saved.arrays.items()}
    for path in sorted(set(specs) ^ set(here)):
        lost = path in specs
        raise ValueError(
            f"{shown} has {'no' if lost else 'a'} leaf {f'{params}.{path}'!r}, which the decoder of "
            f"config.json {'needs' if lost else 'has not'}: give the config.json of this model with --config"
        )
    for path, spec in specs.items():
        if here[path].shape != spec.shape:
            raise ValueError(
                f"{f'{params}.{path}'!r} is {list(here[path].shape)} in {shown}, but {list(spec.shape)} "
                "by config.json: give the config.json of this model with --config"
            )
    return {path: Entry(here[path].shape, DTYPES[here[path].dtype]) for path in specs}


def _by_file(here: HfFolder, wanted: Iterable[str], names: tuple[HfTensor, ...]) -> list[str]:
    """The leaves in the order in which the files hold them, so that each file is read in one go."""
    first: dict[str, Path] = {}
    for name in names:
        if not name.copy:
            file = here.tensors[name.name].file
            first[name.leaf] = min(first.get(name.leaf, file), file)
    return sorted(wanted, key=lambda path: first[path])


def _require_no_more(cfg: DecoderConfig, here: HfFolder) -> None:
    """ValueError if the layers and experts are far more than the folder's tensors: their names alone would fill the
    memory. What is only a few more is found, and named, by `check_fit`.
    """
    count = cfg.layers * (cfg.moe.experts if cfg.moe else 1)
    if count > 100 * len(here.tensors):
        raise ValueError(
            f"{here.path / CONFIG} describes {cfg.layers:,} layers with {count:,} experts, and the folder holds "
            f"{len(here.tensors):,} tensors: give the config.json that belongs to these weights"
        )


def _read_assets(folder: Path) -> dict[str, bytes]:
    """The small files beside the weights, by their paths in the folder; ValueError for links that lead elsewhere."""
    found = {}
    for below in _ASSET_FOLDERS:
        here = folder / below
        entries = [entry for entry in here.iterdir() if _is_asset(entry.name)] if here.is_dir() else []
        for name in sorted(entry.name for entry in entries if entry.is_symlink() or entry.is_file()):
            found[_joined(below, name)] = read_member(folder, name, limit=_ASSET_BYTES, below=below)
    return found


def _copy_assets(store: Store, folder: Path) -> None:
    """The small files that were kept beside the steps, but for the configuration, into a model's folder."""
    for below in _ASSET_FOLDERS:
        for name in filter(_is_asset, store.files(_joined(ASSETS, below))):
            if (below, name) != ("", CONFIG):
                content = store.read(_joined(ASSETS, below, name), limit=_ASSET_BYTES)
                if below:
                    _require_folder(folder / below)
                    (folder / below).mkdir(exist_ok=True)
                write_bytes(folder / below / name, content)


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _is_asset(name: str) -> bool:
    """Of the small files beside the weights: configurations, the tokenizer."""
    return Path(name).suffix in _ASSET_SUFFIXES and not name.endswith(".index.json")
