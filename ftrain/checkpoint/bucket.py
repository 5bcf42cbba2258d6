"""Checkpoints in an object store: `s3://`, `gs://`, or `memory://` of this process, through tensorstore's kvstores.

Nothing can be renamed there and nothing be locked; single objects are replaced at once. So a step is its manifest: the
data is written where the step will be, the manifest last, `latest` after it. A step that exists is written again into
a folder of its own, to which the new manifest refers (its `base`). Two runs must not write into one store: the later
one would take the other's unfinished step for a leftover.
"""

import hashlib
import json
import logging
import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import tensorstore as ts

from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.folders import LATEST, MANIFEST, named_step, step_name, steps_of
from ftrain.checkpoint.objects import PATIENCE, Objects
from ftrain.checkpoint.store import (
    MANIFEST_BYTES,
    NO_RECORDS,
    FileRecord,
    HeldStep,
    KvSpec,
    Lock,
    NewStep,
    Records,
    StepFolder,
    Store,
    join,
)

_log = logging.getLogger("ftrain.checkpoint")
_HASHED = ("manifest.ocdbt", "zarr.json")


class Bucket(Store):
    """A folder of an object store.

    A store in `memory://` lives as long as this object.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] = MappingProxyType({}), *, patience: float = PATIENCE
    ) -> None:
        """Open the store.

        Args:
            url: `s3://bucket/folder`, `gs://bucket/folder` or `memory://name`.
            options: entries of tensorstore's spec of the kvstore (https://google.github.io/tensorstore/kvstore/), as
                `endpoint`, `aws_region`, `aws_credentials` for S3. What they do not say the environment decides, as
                AWS_ENDPOINT_URL and AWS_REGION for S3.
            patience: seconds after which a list, manifest or pointer that the store does not give is a TimeoutError.

        Raises:
            ValueError: the URL is none of these, or tensorstore refuses the options.

        >>> import torch
        >>> from ftrain.checkpoint import Bucket, restore, save, steps
        >>> store = Bucket("memory://runs/one")
        >>> save({"w": torch.ones(2)}, store, 3)
        >>> steps(store), restore({"w": torch.zeros(2)}, store)
        ([3], {'w': tensor([1., 1.])})
        """
        self.objects = Objects(url, options, patience=patience)

    def show(self, name: str = "") -> str:
        """The URL of an object, for messages."""
        return self.objects.show(name)

    def steps(self) -> list[int]:
        """The steps whose manifest is listed, ascending. ValueError of tensorstore if the store gives no list."""
        names = self.objects.names("global_step_")
        return steps_of([name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(MANIFEST)])

    def has(self, step: int) -> bool:
        """Whether a step has a manifest, asked for by its name: a listing may be behind."""
        return self.objects.get(_manifest(step)) is not None

    def hold(self, step: int) -> HeldStep:
        """The step with its manifest of now; DamagedCheckpoint when it has none. OSError if that is too large."""
        name = _manifest(step)
        try:
            return _HeldPrefix(self, step, self.read(name, limit=MANIFEST_BYTES))
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{self.show(name)} is missing: this is not a complete checkpoint") from None

    def delete(self, step: int) -> None:
        """Delete a step, its manifest first; of one that is not there nothing."""
        self.objects.delete([_manifest(step)])
        self.objects.delete(self.objects.names(f"{step_name(step)}/"))

    def named(self) -> int | None:
        """The step that the pointer names; None where it is missing or names none."""
        found = self.objects.get(LATEST)
        return None if found is None else named_step(found)

    def name_latest(self, step: int | None) -> None:
        """Make the pointer name a step, or remove it."""
        if step is None:
            self.objects.delete([LATEST])
        else:
            self.objects.put(LATEST, f"{step}\n".encode())

    def files(self, folder: str) -> list[str]:
        """The names of the objects directly below a folder, in order."""
        return [name for name in _below(self.objects, folder) if "/" not in name]

    def read(self, name: str, *, limit: int) -> bytes:
        """The content of an object; FileNotFoundError, or OSError when it has more than `limit` bytes."""
        found = self.objects.get(name)
        if found is None:
            raise FileNotFoundError(f"{self.show(name)} is missing")
        if len(found) > limit:
            raise OSError(f"{self.show(name)} has {len(found):,} bytes, and may have {limit:,}")
        return found

    def write(self, name: str, content: bytes) -> None:
        """Give an object this content at once."""
        self.objects.put(name, content)

    def lock(self) -> Lock:
        """Nothing: object stores have no locks, and who starts runs must see to it that one writes."""
        return _NoLock()

    def begin(self, step: int) -> NewStep:
        """Begin a step in its own folder, or below it in a fresh one where it exists; leftovers are removed first."""
        names = self.objects.names("global_step_")
        without = {name.split("/", 1)[0] for name in names} - {step_name(step) for step in self.steps()}
        # A listing may lack what is there: no folder is a leftover before its manifest was asked for by name.
        asked = dict(zip(sorted(without), self._manifests(sorted(without)), strict=True))
        for folder in (folder for folder, manifest in asked.items() if manifest is None):
            self.objects.delete(name for name in names if name.startswith(f"{folder}/"))
        name = step_name(step)
        return self.begun(step, join([name, f"again-{secrets.token_hex(4)}"]) if self.has(step) else name)

    def _manifests(self, folders: list[str]) -> list[bytes | None]:
        return self.objects.contents([join([folder, MANIFEST]) for folder in folders])

    def begun(self, step: int, folder: str) -> NewStep:
        """The step that another process has begun in this folder."""
        return _NewPrefix(self, step, folder)


class _Prefix(StepFolder):
    """The objects that begin with a step's folder."""

    def __init__(self, store: Bucket, step: int, prefix: str) -> None:
        self.store, self.objects, self.step, self.prefix = store, store.objects, step, prefix

    def show(self, name: str = "") -> str:
        return self.objects.show(join([self.prefix, name]))

    def kvstore(self, folder: str) -> KvSpec:
        return self.objects.kvstore(join([self.prefix, folder]))

    def context(self) -> ts.Context:
        return self.objects.context()


class _HeldPrefix(_Prefix, HeldStep):
    """A step's objects. Nothing holds them: a version that is replaced loses them, and the manifest tells which is
    there.
    """

    def __init__(self, store: Bucket, step: int, manifest: bytes) -> None:
        super().__init__(store, step, step_name(step))
        self.manifest = manifest

    def wrong(self, base: str, files: Records, *, hashed: bool) -> tuple[str, str] | None:
        folder = join([self.prefix, base])
        here = set(_below(self.objects, folder))
        small = [name for name, record in files.items() if hashed and record.sha256 is not None and name in here]
        found = dict(zip(small, self.objects.contents([join([folder, name]) for name in small]), strict=True))
        for name, record in files.items():
            if name not in here or found.get(name, b"") is None:
                return name, "is missing"
            content = found.get(name)
            if content is not None and _record(content) != record:
                return name, "is damaged (its checksum is wrong)"
        return None

    def require_plain(self, folder: str) -> None:
        return  # a store has objects alone

    def files(self, folder: str) -> None:
        return None

    def is_replaced(self) -> bool:
        try:
            return self.store.read(_manifest(self.step), limit=MANIFEST_BYTES) != self.manifest
        except FileNotFoundError:
            return True

    @property
    def is_frozen(self) -> bool:
        return False

    def close(self) -> None:
        return


class _NewPrefix(_Prefix, NewStep):
    """A step's objects before its manifest is there, or before its manifest refers to them."""

    def __init__(self, store: Bucket, step: int, folder: str) -> None:
        super().__init__(store, step, folder)
        self.folder, self.base = folder, folder.removeprefix(step_name(step)).removeprefix("/")

    def is_here(self) -> bool:
        return True

    def records(self, below: str = "", *, known: Records = NO_RECORDS) -> dict[str, FileRecord]:
        names = [join([below, name]) for name in _below(self.objects, join([self.prefix, below]))]
        hashed = [name for name in names if name not in known and name.endswith(_HASHED)]
        settled = self.objects.settled([join([self.prefix, name]) for name in hashed])
        contents = dict(zip(hashed, settled, strict=True))
        found = dict(known)
        for name in names:
            if name not in known:
                found[name] = _record(contents[name]) if name in contents else FileRecord(None, None)
        return found

    def remove(self, name: str) -> None:
        self.objects.delete([join([self.prefix, name])])

    def commit(self, manifest: str) -> None:
        name, content = _manifest(self.step), manifest.encode()
        self.objects.put(name, content)
        if self.objects.settled([name]) != [content]:
            raise OSError(f"{self.objects.show(name)} does not hold what was written: save again")
        self.store.name_latest(self.step)
        if self.base:
            old = [
                key for key in self.objects.names(f"{step_name(self.step)}/") if not key.startswith(f"{self.prefix}/")
            ]
            self.objects.delete(key for key in old if key != name)

    def abort(self) -> None:
        try:
            if not self._is_committed():
                self.objects.delete(self.objects.names(f"{self.prefix}/"))
        except Exception as error:  # would hide the error that led here; the next save cleans up anyway
            _log.warning("what was written into %s could not be removed: %s", self.show(), error)

    def _is_committed(self) -> bool:
        found = self.objects.get(_manifest(self.step))
        return found is not None and json.loads(found)["base"] == self.base


class _NoLock(Lock):
    def is_held(self) -> bool:
        return True

    def release(self) -> None:
        return


def _manifest(step: int) -> str:
    return f"{step_name(step)}/{MANIFEST}"


def _below(objects: Objects, folder: str) -> list[str]:
    """The names of all objects below a folder, relative to it."""
    return [name.removeprefix(f"{folder}/") for name in objects.names(f"{folder}/")]


def _record(content: bytes) -> FileRecord:
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())
