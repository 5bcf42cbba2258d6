"""The manifest of a checkpoint: every leaf by its path, every file by its size and hash, itself by a hash."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftrain.checkpoint.dtypes import DTYPES
from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.folders import KEY_BYTES, MANIFEST, MOST, OTHER_PART, PARTS, part_of, storage_key
from ftrain.checkpoint.store import HASHED_BYTES, MANIFEST_BYTES, FileRecord, HeldStep, Store
from ftrain.files.outside import (
    Misfit,
    anything,
    either,
    flag,
    listed,
    mapped,
    number,
    one_of,
    parse,
    record,
    text,
    whole,
)

VERSION = 2
Scalar = bool | int | float | str
INTEGERS = range(-(2**63), 2**63)
"""Those that may be leaves: of int64."""


@dataclasses.dataclass(frozen=True)
class ArrayLeaf:
    """A tensor: its sub-folder `part`, its `key` there, `shape` and `chunk` in elements, torch's name of its dtype."""

    part: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the model: its global `shape` and its logical `axes`, by which plans divide it."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What one checkpoint holds. `arrays` and `scalars` go by leaf path, `parameters` (where the run told them) by path
    in the model; `database` and `checksum` are the `Storage` it was written with. `files` go by name relative to
    `base`, a folder in the step's own ("" but where a step was written again in a store that cannot rename).

    `order`: grows from save to save of a run, whatever its steps do; 0 where it is not known. `good`: whether the run
    was well when it saved this. `sums`: of each array's chunks (see sums.py); empty without `checksum`.
    """

    step: int
    database: bool
    checksum: bool
    arrays: dict[str, ArrayLeaf]
    scalars: dict[str, Scalar]
    metrics: dict[str, float]
    files: dict[str, FileRecord]
    base: str = ""
    parameters: dict[str, Parameter] = dataclasses.field(default_factory=dict)
    order: int = 0
    good: bool = True
    sums: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)


def dumps(manifest: Manifest) -> str:
    """The manifest as JSON, with a SHA-256 of all the rest as its last entry.

    Raises:
        ValueError: `read` would refuse it: a save promises nothing that nobody can restore.
    """
    body = {
        "format": "ftrain checkpoint",
        "version": VERSION,
        **dataclasses.asdict(manifest),
        "scalars": {path: _encode(value) for path, value in manifest.scalars.items()},
        "metrics": {name: _encode(float(value)) for name, value in manifest.metrics.items()},
    }
    content = _canonical({**body, "sha256": _digest(body)})
    if len(content) > MANIFEST_BYTES:
        raise ValueError(
            f"the manifest would have {len(content):,} bytes, and may have {MANIFEST_BYTES:,}: make tensors of the "
            "long texts in the state, or save fewer leaves"
        )
    try:
        _MANIFEST(json.loads(_canonical(body)), "")
        _require_sound(manifest)
    except Misfit as misfit:
        raise ValueError(f"the state cannot be saved: {misfit}") from None
    return content


def load(store: Store, step: int) -> Manifest:
    """The manifest of a step of a store.

    Raises:
        DamagedCheckpoint: there is none, or as `read`.
        ValueError: as `read`.
    """
    with store.hold(step) as held:
        return read(held)


def read(held: HeldStep) -> Manifest:
    """The manifest of a step that is held open, checked.

    Raises:
        DamagedCheckpoint: it is not the text that was written, or is the one of another step.
        ValueError: it was written by a newer version.
    """
    shown = held.show(MANIFEST)
    try:
        content = held.manifest.decode()
        body = parse(content, shown)
    except ValueError as error:
        raise DamagedCheckpoint(f"{shown} is damaged ({error}): restore another step") from error
    if not isinstance(body, dict) or "sha256" not in body:
        raise DamagedCheckpoint(f"{shown} is damaged (it is no object with a 'sha256'): restore another step")
    claimed = body.pop("sha256")
    try:
        intact = claimed == _digest(body) and content == _canonical({**body, "sha256": claimed})
    except RecursionError:
        raise DamagedCheckpoint(f"{shown} is damaged (it is nested too deeply): restore another step") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{shown} is damaged ({error}): restore another step") from error
    if not intact:
        raise DamagedCheckpoint(f"{shown} is damaged (its checksum is wrong): restore another step")
    try:
        _VERSIONED(body, "")
        if body["version"] > VERSION:
            raise ValueError(
                f"{shown} has version {body['version']}, this ftrain reads up to {VERSION}: upgrade ftrain"
            )
        _MANIFEST(body, "")
        found = _from_json(body)
        _require_sound(found)
    except Misfit as misfit:
        raise DamagedCheckpoint(f"{shown} was not written by ftrain: {misfit}") from None
    if found.step != held.step:
        raise DamagedCheckpoint(
            f"{shown} is that of step {found.step}, not of step {held.step}: give the folder its own name again"
        )
    return found


def _file_name(value: Any, at: str) -> None:
    parts = value.split("/") if isinstance(value, str) else []
    if len(parts) < 2 or "\0" in value or any(part in ("", ".", "..") for part in parts):
        raise Misfit(f"{at} has a file {value!r}, which is no name in a part of a checkpoint")


def _base(value: Any, at: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"(again-[0-9a-f]{8})?", value):
        raise Misfit(f"{at} is {value!r}, which is no folder of a step")


def _scalar(value: Any, at: str) -> None:
    if type(value) is int:
        _INT64(value, at)
    elif type(value) not in (bool, str) and not (type(value) is float and math.isfinite(value)):
        _SPECIAL(value, at)


def _sha256(value: Any, at: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise Misfit(f"{at} is no SHA-256")


_VERSIONED = record({"version": whole(1)}, others=True)
_DIMS = listed(whole(0))
_ARRAY = record(
    {
        "part": one_of(*PARTS.values(), OTHER_PART),
        "key": text(KEY_BYTES),
        "shape": _DIMS,
        "dtype": one_of(*DTYPES),
        "chunk": listed(whole(1)),
    }
)
_INT64 = whole(INTEGERS.start, INTEGERS.stop - 1)
_SPECIAL = record({"float": one_of("nan", "inf", "-inf")})
_MANIFEST = record(
    {
        "format": one_of("ftrain checkpoint"),
        "version": whole(1),
        "step": whole(0, MOST - 1),
        "database": flag,
        "checksum": flag,
        "arrays": mapped(_ARRAY),
        "scalars": mapped(_scalar),
        "metrics": mapped(either(number(), _SPECIAL)),
        "files": mapped(record({"bytes": either(one_of(None), whole(0)), "sha256": either(one_of(None), _sha256)})),
    },
    optional={
        "base": _base,
        "parameters": mapped(record({"shape": _DIMS, "axes": listed(either(one_of(None), text()))})),
        "order": whole(0),
        "good": flag,
        "sums": anything,
    },
)


def _require_sound(manifest: Manifest) -> None:
    """What no single entry can tell: names belong to their leaves, sizes to each other."""
    for path, leaf in manifest.arrays.items():
        if leaf.part != part_of(path) or leaf.key != storage_key(path):
            raise Misfit(f"arrays.{path} is kept at {leaf.part}/{leaf.key}, which is not this leaf's place")
        fits = len(leaf.chunk) == len(leaf.shape) and all(
            chunk <= max(1, size) for chunk, size in zip(leaf.chunk, leaf.shape, strict=True)
        )
        if not fits or math.prod(leaf.shape) * DTYPES[leaf.dtype].itemsize >= 2**63:
            raise Misfit(f"arrays.{path} has the shape {list(leaf.shape)} in chunks of {list(leaf.chunk)}")
    for name, file in manifest.files.items():
        _file_name(name, "files")
        if file.sha256 is not None and file.bytes is not None and file.bytes > HASHED_BYTES:
            raise Misfit(f"files.{name} has {file.bytes:,} bytes and a hash, which only small ones have")
    both = manifest.arrays.keys() & manifest.scalars.keys()
    if both:
        raise Misfit(f"{min(both)} is an array and a value")
    _require_sums(manifest)


def _require_sums(manifest: Manifest) -> None:
    """For each array, either none of any, or one of each chunk."""
    if not manifest.sums:
        return
    for path, leaf in manifest.arrays.items():
        known = manifest.sums.get(path)
        count = math.prod(-(-size // chunk) for size, chunk in zip(leaf.shape, leaf.chunk, strict=True))
        if not isinstance(known, list) or len(known) != count or any(type(n) is not int for n in known):
            raise Misfit(f"sums.{path} is no list of {count} numbers")


def _from_json(body: dict[str, Any]) -> Manifest:
    arrays = {
        path: ArrayLeaf(**{**leaf, "shape": tuple(leaf["shape"]), "chunk": tuple(leaf["chunk"])})
        for path, leaf in body["arrays"].items()
    }
    sums = body.get("sums", {})
    if not isinstance(sums, dict):
        raise Misfit("sums is no object")
    return Manifest(
        step=body["step"],
        database=body["database"],
        checksum=body["checksum"],
        arrays=arrays,
        scalars={path: _decode(value) for path, value in body["scalars"].items()},
        metrics={name: float(_decode(value)) for name, value in body["metrics"].items()},
        files={name: FileRecord(**file) for name, file in body["files"].items()},
        base=body.get("base", ""),
        parameters={
            path: Parameter(tuple(found["shape"]), tuple(found["axes"]))
            for path, found in body.get("parameters", {}).items()
        },
        order=body.get("order", 0),
        good=body.get("good", True),
        sums=sums,
    )


def _encode(value: Scalar) -> Any:
    """JSON has no NaN and no infinities, and any string may be a leaf: such floats are `{"float": "nan"}`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _decode(value: Any) -> Scalar:
    return float(value["float"]) if isinstance(value, dict) else value


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(body).encode()).hexdigest()


def _canonical(body: dict[str, Any]) -> str:
    """One line per leaf and per file, so that a reader and `diff` can follow."""
    entries = (f" {_line(name)}: {_block(value)}" for name, value in body.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _block(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return _line(value)
    return "{\n" + ",\n".join(f"  {_line(name)}: {_line(item)}" for name, item in value.items()) + "\n }"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)
