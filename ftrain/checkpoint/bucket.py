"""Checkpoints in an object store: `s3://`, `gs://`, or `memory://` of this process, through tensorstore's kvstores.

Nothing can be renamed there and nothing be locked; single objects are replaced at once. So a step is its manifest: the
data is written where the step will be, the manifest last, `latest` after it. A step that exists is written again into
a folder of its own, to which the new manifest refers (its `base`). Two runs must not write into one place: the later
one would take the other's unfinished step for a leftover.
"""

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import tensorstore as ts

from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.folders import LATEST, MANIFEST, named_step, step_name, steps_of
from ftrain.checkpoint.place import (
    MANIFEST_BYTES,
    NO_RECORDS,
    FileRecord,
    HeldStep,
    KvSpec,
    Lock,
    Place,
    Records,
    base_of,
    join,
)

_log = logging.getLogger("ftrain.checkpoint")
_DRIVERS = {"s3": "s3", "gs": "gcs", "memory": "memory"}
_HASHED = ("manifest.ocdbt", "zarr.json")
_ATTEMPTS = 6


class Bucket(Place):
    """A folder of an object store.

    A place in `memory://` lives as long as this object.
    """

    def __init__(self, url: str, options: Mapping[str, Any] = MappingProxyType({})) -> None:
        """`options` go into tensorstore's spec of the kvstore, as `endpoint`, `aws_region`, `aws_credentials` for S3;
        what they do not say the environment decides, as AWS_ENDPOINT_URL and AWS_REGION for S3. ValueError: the URL is
        none of these.
        """
        found = urlsplit(url)
        if found.scheme not in _DRIVERS or not found.netloc:
            known = ", ".join(f"{scheme}://..." for scheme in _DRIVERS)
            raise ValueError(f"{url!r} is no place for checkpoints: give a path, or one of {known}")
        self._url = url.rstrip("/")
        known_here = _of_environment() if found.scheme == "s3" else {}
        self._spec: KvSpec = {"driver": _DRIVERS[found.scheme], **known_here, **options}
        path = found.path.strip("/")
        if found.scheme == "memory":
            path = join([found.netloc, path])
        else:
            self._spec["bucket"] = found.netloc
        self._path = f"{path}/" if path else ""
        # Of what is opened with the same context a driver may keep what it has read: only the memory itself is shared.
        self._shared = ts.Context({"memory_key_value_store": {}})
        self._root = ts.KvStore.open(self.kvstore(""), context=self.context()).result()

    def show(self, name: str = "") -> str:
        return join([self._url, name])

    def kvstore(self, folder: str) -> KvSpec:
        return {**self._spec, "path": self._path + (f"{folder}/" if folder else "")}

    def context(self) -> ts.Context:
        return ts.Context({"cache_pool": {}}, self._shared)

    def steps(self) -> list[int]:
        names = [name.removesuffix(f"/{MANIFEST}") for name in self._names("global_step_") if name.endswith(MANIFEST)]
        return steps_of(names)

    def named(self) -> int | None:
        found = self._root.read(LATEST).result()
        return named_step(found.value) if found.state == "value" else None

    def hold(self, step: int) -> HeldStep:
        name = f"{step_name(step)}/{MANIFEST}"
        try:
            return _HeldPrefix(self, step, self.read(name, limit=MANIFEST_BYTES))
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{self.show(name)} is missing: this is not a complete checkpoint") from None

    def read(self, name: str, *, limit: int) -> bytes:
        found = self._root.read(name).result()
        if found.state != "value":
            raise FileNotFoundError(f"{self.show(name)} is missing")
        if len(found.value) > limit:
            raise OSError(f"{self.show(name)} has {len(found.value):,} bytes, and may have {limit:,}")
        return found.value

    def files(self, folder: str) -> list[str]:
        names = (name.removeprefix(f"{folder}/") for name in self._names(f"{folder}/"))
        return [name for name in names if "/" not in name]

    def write(self, name: str, content: bytes) -> None:
        self._root.write(name, content).result()

    def lock(self) -> Lock:
        return _NoLock()

    def clean(self) -> None:
        committed = {step_name(step) for step in self.steps()}
        for folder in {name.split("/", 1)[0] for name in self._names("global_step_")} - committed:
            self._delete_below(folder)

    def begin(self, step: int) -> str:
        name = step_name(step)
        return join([name, f"again-{secrets.token_hex(4)}"]) if step in self.steps() else name

    def sees(self, folder: str) -> bool:
        return True

    def records(self, folder: str, below: str = "", *, known: Records = NO_RECORDS) -> dict[str, FileRecord]:
        found = dict(known)
        names = [name.removeprefix(f"{folder}/") for name in self._names(join([folder, below]) + "/")]
        hashed = [name for name in names if name not in known and name.endswith(_HASHED)]
        contents = dict(zip(hashed, self._settled([join([folder, name]) for name in hashed]), strict=True))
        for name in names:
            if name not in known:
                found[name] = _record(contents[name]) if name in contents else FileRecord(None, None)
        return found

    def remove(self, name: str) -> None:
        self._root.write(name, None).result()

    def commit(self, folder: str, step: int, manifest: str) -> None:
        name = step_name(step)
        self._root.write(f"{name}/{MANIFEST}", manifest.encode()).result()
        if self._settled([f"{name}/{MANIFEST}"]) != [manifest.encode()]:
            raise OSError(f"{self.show(f'{name}/{MANIFEST}')} does not hold what was written: save again")
        self.name_latest(step)
        if folder != name:
            replaced = [key for key in self._names(f"{name}/") if not key.startswith(f"{folder}/")]
            self._delete(key for key in replaced if key != f"{name}/{MANIFEST}")

    def abort(self, folder: str) -> None:
        try:
            if not self._is_committed(folder):
                self._delete_below(folder)
        except Exception as error:  # would hide the error that led here; the next save cleans up anyway
            _log.warning("what was written into %s could not be removed: %s", self.show(folder), error)

    def name_latest(self, step: int | None) -> None:
        self._root.write(LATEST, None if step is None else f"{step}\n".encode()).result()

    def delete(self, step: int) -> None:
        self.remove(f"{step_name(step)}/{MANIFEST}")
        self._delete_below(step_name(step))

    def _settled(self, names: Sequence[str]) -> list[bytes]:
        """The contents of objects that have just been written, each read until two answers in a row agree.

        A store may answer wrongly, or not know yet what it has listed. What is read here goes into the manifest, which
        is then believed; so one answer is not.
        """
        found: list[bytes | None] = [None] * len(names)
        unsettled = list(range(len(names)))
        for attempt in range(_ATTEMPTS):
            time.sleep(0.0 if attempt < 2 else 0.1 * 2**attempt)
            for i, asked in [(i, self._root.read(names[i])) for i in unsettled]:
                answer = asked.result()
                content = answer.value if answer.state == "value" else None
                if content is not None and content == found[i]:
                    unsettled.remove(i)
                found[i] = content
            if not unsettled:
                return [content for content in found if content is not None]
        raise OSError(f"{self.show(names[unsettled[0]])} was written, but is missing or differs at each reading")

    def _is_committed(self, folder: str) -> bool:
        name = folder.split("/", 1)[0]
        found = self._root.read(f"{name}/{MANIFEST}").result()
        return found.state == "value" and json.loads(found.value)["base"] == base_of(folder, name)

    def names(self, folder: str) -> set[str]:
        """The names of all objects below a folder, relative to it."""
        return {name.removeprefix(f"{folder}/") for name in self._names(f"{folder}/")}

    def contents(self, names: Sequence[str]) -> list[bytes | None]:
        """The contents of small objects; None for those that are not there."""
        answers = [asked.result() for asked in [self._root.read(name) for name in names]]
        return [answer.value if answer.state == "value" else None for answer in answers]

    def _names(self, prefix: str) -> list[str]:
        """The names of all objects that begin so, in order."""
        beyond = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        return sorted(key.decode() for key in self._root.list(ts.KvStore.KeyRange(prefix, beyond)).result())

    def _delete_below(self, folder: str) -> None:
        self._delete(self._names(f"{folder}/"))

    def _delete(self, names: Iterable[str]) -> None:
        for future in [self._root.write(name, None) for name in names]:
            future.result()


class _HeldPrefix(HeldStep):
    """A step's objects. Nothing holds them: a version that is replaced loses them, and the manifest tells which is
    there.
    """

    def __init__(self, bucket: Bucket, step: int, manifest: bytes) -> None:
        self._bucket, self.step, self.manifest = bucket, step, manifest

    def show(self, name: str = "") -> str:
        return self._bucket.show(join([step_name(self.step), name]))

    def kvstore(self, folder: str) -> KvSpec:
        return self._bucket.kvstore(join([step_name(self.step), folder]))

    def wrong(self, base: str, files: Records, *, hashed: bool) -> tuple[str, str] | None:
        folder = join([step_name(self.step), base])
        here = self._bucket.names(folder)
        small = [name for name, record in files.items() if hashed and record.sha256 is not None and name in here]
        contents = self._bucket.contents([join([folder, name]) for name in small])
        found = dict(zip(small, contents, strict=True))
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
            return self._bucket.read(f"{step_name(self.step)}/{MANIFEST}", limit=MANIFEST_BYTES) != self.manifest
        except FileNotFoundError:
            return True

    @property
    def is_frozen(self) -> bool:
        return False

    def close(self) -> None:
        return


def _of_environment() -> KvSpec:
    """What tensorstore does not read from the environment by itself: a server of one's own."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return {
        **({"endpoint": endpoint} if endpoint else {}),
        **({"aws_region": region} if region else {}),
    }


class _NoLock(Lock):
    def release(self) -> None:
        return


def _record(content: bytes) -> FileRecord:
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())
