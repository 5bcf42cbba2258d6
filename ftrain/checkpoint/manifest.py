"""The manifest of a checkpoint: every leaf by its path, every file by its size and hash, itself by a hash."""

import dataclasses
import hashlib
import json
import math
from typing import Any

from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.folders import MANIFEST, step_name
from ftrain.checkpoint.place import FileRecord, Place

VERSION = 1
Scalar = bool | int | float | str


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
    `base`, a folder in the step's own ("" but where a step was written again in a place that cannot rename).
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


def dumps(manifest: Manifest) -> str:
    """The manifest as JSON, with a SHA-256 of all the rest as its last entry."""
    body = {
        "format": "ftrain checkpoint",
        "version": VERSION,
        **dataclasses.asdict(manifest),
        "scalars": {path: _encode(value) for path, value in manifest.scalars.items()},
        "metrics": {name: _encode(float(value)) for name, value in manifest.metrics.items()},
    }
    return _canonical({**body, "sha256": _digest(body)})


def load(place: Place, step: int) -> Manifest:
    """Read and check the manifest of a step.

    Raises:
        DamagedCheckpoint: it is missing, or not the text that was written.
        ValueError: it was written by a newer version.
    """
    name = f"{step_name(step)}/{MANIFEST}"
    path = place.show(name)
    try:
        text = place.read(name).decode()
        body = json.loads(text)
        claimed = body.pop("sha256")
        intact = claimed == _digest(body) and text == _canonical({**body, "sha256": claimed})
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing: this is not a complete checkpoint") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}): restore another step") from error
    if not intact:
        raise DamagedCheckpoint(f"{path} is damaged (its checksum is wrong): restore another step")
    if body["version"] > VERSION:
        raise ValueError(f"{path} has version {body['version']}, this ftrain reads up to {VERSION}: upgrade ftrain")
    return _from_json(body)


def _from_json(body: dict[str, Any]) -> Manifest:
    arrays = {
        path: ArrayLeaf(**{**leaf, "shape": tuple(leaf["shape"]), "chunk": tuple(leaf["chunk"])})
        for path, leaf in body["arrays"].items()
    }
    return Manifest(
        step=body["step"],
        database=body["database"],
        checksum=body["checksum"],
        arrays=arrays,
        scalars={path: _decode(value) for path, value in body["scalars"].items()},
        metrics={name: float(_decode(value)) for name, value in body["metrics"].items()},
        files={name: FileRecord(**record) for name, record in body["files"].items()},
        base=body.get("base", ""),
        parameters={
            path: Parameter(tuple(found["shape"]), tuple(found["axes"]))
            for path, found in body.get("parameters", {}).items()
        },
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
