"""A folder of safetensors as one mapping from names to tensors on disk; only headers are read here."""

import difflib
import fnmatch
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ftrain.files.beneath import kind_of, read_file
from ftrain.files.outside import JSON_BYTES, check, mapped, parse, text

STEM = "model"
INDEX = f"{STEM}.safetensors.index.json"
CONFIG = "config.json"
SINGLE = f"{STEM}.safetensors"

# The format's names, in its order of dtypes: a file holds the tensors of later ones first.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its file, shape and dtype. `shown`: the file's name in the model's folder."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    shown: Path


@dataclass(frozen=True)
class HfFolder:
    """The tensors of a model in `path`, by name, from `model.safetensors` or the files that its index lists."""

    path: Path
    tensors: dict[str, Stored]

    @staticmethod
    def open(path: str | Path, *, stem: str = STEM) -> "HfFolder":
        """Read the headers of a folder's files. `stem`: what they are called, before `.safetensors`.

        Raises:
            ValueError: there are none, a file is missing or damaged or a link that leads elsewhere, or the index and
                the files disagree.

        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from ftrain.hf import HfFolder
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"lm_head.weight": torch.zeros(8, 4)}, f"{folder}/model.safetensors")
        >>> here = HfFolder.open(folder)
        >>> {name: (stored.shape, stored.dtype) for name, stored in here.tensors.items()}
        {'lm_head.weight': ((8, 4), torch.float32)}
        """
        folder = Path(path)
        tensors: dict[str, Stored] = {}
        index = _index(folder, stem)
        for name in [f"{stem}.safetensors"] if index is None else sorted(set(index.values())):
            tensors.update(_header(member(folder, name), folder / name))
        if index is not None:
            _check_index(folder / f"{stem}.safetensors.index.json", index, tensors)
        return HfFolder(folder, tensors)

    def config(self) -> dict[str, Any]:
        """What `config.json` says; ValueError if it is missing, no JSON object, or a link that leads elsewhere."""
        return parse_json(read_member(self.path, CONFIG, limit=JSON_BYTES), str(self.path / CONFIG))

    def find(self, name: str, *, wanted_for: str) -> Stored:
        """The tensor of this name; `ValueError` names what it is `wanted_for` and the nearest name that is there."""
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, n=1, cutoff=0.8)
            hint = f"; nearest there: {near[0]!r}" if near else ""
            raise ValueError(
                f"{self.path} has no tensor {name!r}, which is our {wanted_for!r}{hint}: "
                "use the configuration that belongs to these weights (its config.json)"
            )
        return self.tensors[name]

    def require_all_known(self, known: Iterable[str], *, besides: Iterable[str] = ()) -> None:
        """`ValueError` if a tensor has none of the `known` names, and matches none of the globs `besides`."""
        names, globs = set(known), tuple(besides)
        others = set(self.tensors) - names
        strange = sorted(name for name in others if not any(fnmatch.fnmatchcase(name, glob) for glob in globs))
        if strange:
            near = difflib.get_close_matches(strange[0], sorted(names), n=1, cutoff=0.8)
            hint = f" (nearest known: {near[0]!r})" if near else ""
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise ValueError(
                f"{self.path} holds {strange[0]!r}{hint}{more}, which this model has not: "
                "use the configuration that belongs to these weights, or pass unexpected='ignore' to leave them out"
            )


def member(folder: Path, name: str, *, below: str = "") -> Path:
    """The regular file `name` of a folder, or what the cache of Hugging Face's hub has in its place: a link to a file
    in the `blobs` of the same repository. `below`: the name of a folder in it where the file lies.

    ValueError for a link that leads elsewhere, a pipe, a device, a name with other folders in it.
    """
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"{name!r} is no name of a file in {folder}: copy the folder again")
    here = folder / below
    file = shown = here / name
    try:
        if below and not stat.S_ISDIR(here.lstat().st_mode):
            raise ValueError(f"{here} is {kind_of(here.lstat().st_mode)}, not a folder: copy the folder again")
        mode = file.lstat().st_mode
        if stat.S_ISLNK(mode):
            file = _blob(file, snapshot=folder)
            mode = file.lstat().st_mode
    except FileNotFoundError:
        raise ValueError(f"{shown} is missing: download or copy the folder again") from None
    except OSError as error:
        raise ValueError(f"{shown} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{shown} is {kind_of(mode)}, not a regular file: copy the folder again")
    return file


def read_member(folder: Path, name: str, *, limit: int, below: str = "") -> bytes:
    """The content of a small file of a folder, whose `name` and `below` are as for `member`.

    ValueError where `member` raises it, or if the file has more than `limit` bytes; OSError where it cannot be read.
    """
    return read_file(member(folder, name, below=below), limit=limit)


def _blob(link: Path, *, snapshot: Path) -> Path:
    target, repository = os.readlink(link), snapshot.parent.parent
    up = "../" * len(link.relative_to(repository).parent.parts)
    found = re.fullmatch(rf"{re.escape(up)}blobs/([0-9A-Za-z]+)", target)
    if snapshot.parent.name != "snapshots" or found is None:
        raise ValueError(f"{link} is a link to {target}: copy the file into the folder")
    return repository / "blobs" / found[1]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that the caller names; `ValueError` names the file if it is missing or is not one."""
    try:
        content = read_file(path, limit=JSON_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: give a folder in Hugging Face's format") from None
    return parse_json(content, str(path))


def parse_json(content: bytes, shown: str) -> dict[str, Any]:
    """The object that a JSON file `shown` holds; `ValueError` names the file if it is not one."""
    try:
        found = parse(content, shown)
    except ValueError as error:
        raise ValueError(f"{error}: copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{shown} holds a {type(found).__name__}, not an object: copy it again")
    return found


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The file as safetensors' reader, which maps it into memory; `ValueError` names one that cannot be read."""
    try:
        reader = safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: download or copy the folder again") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}): download or copy it again") from error
    with reader as tensors:
        yield tensors


def _index(folder: Path, stem: str) -> dict[str, str] | None:
    """The file of each tensor; `None` where one file holds all."""
    single, several = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if os.path.lexists(folder / several):
        shown = str(folder / several)
        weights = parse_json(read_member(folder, several, limit=JSON_BYTES), shown).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise ValueError(f"{shown} has no 'weight_map': copy it again")
        return check(weights, mapped(text(255)), shown)
    if os.path.lexists(folder / single):
        return None
    others = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    found = f"; it holds {others[0]}, which is pickled: save it as safetensors first" if others else ""
    raise ValueError(f"{folder} holds neither {single} nor {several}{found}")


def _header(file: Path, shown: Path) -> dict[str, Stored]:
    found = {}
    with opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  # no dict
            entry = tensors.get_slice(name)
            if entry.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{shown}: {name!r} has dtype {entry.get_dtype()}, not read here; known: {', '.join(DTYPES)}"
                )
            found[name] = Stored(file, tuple(entry.get_shape()), DTYPES[entry.get_dtype()], shown)
    return found


def _check_index(shown: Path, index: dict[str, str], tensors: dict[str, Stored]) -> None:
    for name, file in index.items():
        if name not in tensors or tensors[name].shown.name != file:
            raise ValueError(f"{shown} says that {file} holds {name!r}, but it does not: copy the folder again")
    strange = sorted(set(tensors) - set(index))
    if strange:
        raise ValueError(
            f"{tensors[strange[0]].shown} holds {strange[0]!r}, which {shown.name} does not list: copy the folder again"
        )
