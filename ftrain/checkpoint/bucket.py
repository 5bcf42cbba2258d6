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
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import tensorstore as ts

from ftrain.checkpoint.folders import LATEST, MANIFEST, named_step, step_name, steps_of
from ftrain.checkpoint.place import NO_RECORDS, FileRecord, KvSpec, Lock, Place, Records, base_of, join

_log = logging.getLogger("ftrain.checkpoint")
_DRIVERS = {"s3": "s3", "gs": "gcs", "memory": "memory"}
_HASHED = ("manifest.ocdbt", "zarr.json")


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

    def latest(self) -> int | None:
        here = self.steps()
        named = named_step(self._root.read(LATEST).result().value.decode(errors="replace"))
        return named if named in here else max(here, default=None)

    def read(self, name: str) -> bytes:
        found = self._root.read(name).result()
        if found.state != "value":
            raise FileNotFoundError(f"{self.show(name)} is missing")
        return found.value

    def files(self, folder: str) -> list[str]:
        names = (name.removeprefix(f"{folder}/") for name in self._names(f"{folder}/"))
        return [name for name in names if "/" not in name]

    def write(self, name: str, content: bytes) -> None:
        self._root.write(name, content).result()

    def wrong(self, folder: str, files: Records, *, hashed: bool) -> tuple[str, str] | None:
        here = {name.removeprefix(f"{folder}/") for name in self._names(f"{folder}/")}
        reading = {}
        for name, record in files.items():
            if name not in here:
                return name, "is missing"
            if hashed and record.sha256 is not None:
                reading[name] = self._root.read(join([folder, name]))
        for name, future in reading.items():
            if _record(future.result().value) != files[name]:
                return name, "is damaged (its checksum is wrong)"
        return None

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
        small = {name: self._root.read(join([folder, name])) for name in names if name.endswith(_HASHED)}
        for name in names:
            if name not in known:
                found[name] = _record(small[name].result().value) if name in small else FileRecord(None, None)
        return found

    def remove(self, name: str) -> None:
        self._root.write(name, None).result()

    def commit(self, folder: str, step: int, manifest: str) -> None:
        name = step_name(step)
        self._root.write(f"{name}/{MANIFEST}", manifest.encode()).result()
        self._root.write(LATEST, f"{step}\n".encode()).result()
        if folder != name:
            replaced = [key for key in self._names(f"{name}/") if not key.startswith(f"{folder}/")]
            self._delete(key for key in replaced if key != f"{name}/{MANIFEST}")

    def abort(self, folder: str) -> None:
        try:
            if not self._is_committed(folder):
                self._delete_below(folder)
        except Exception as error:  # would hide the error that led here; the next save cleans up anyway
            _log.warning("what was written into %s could not be removed: %s", self.show(folder), error)

    def delete(self, step: int) -> None:
        if self.latest() == step:
            others = [other for other in self.steps() if other != step]
            self._root.write(LATEST, f"{others[-1]}\n".encode() if others else None).result()
        self.remove(f"{step_name(step)}/{MANIFEST}")
        self._delete_below(step_name(step))

    def _is_committed(self, folder: str) -> bool:
        name = folder.split("/", 1)[0]
        found = self._root.read(f"{name}/{MANIFEST}").result()
        return found.state == "value" and json.loads(found.value)["base"] == base_of(folder, name)

    def _names(self, prefix: str) -> list[str]:
        """The names of all objects that begin so, in order."""
        beyond = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        return sorted(key.decode() for key in self._root.list(ts.KvStore.KeyRange(prefix, beyond)).result())

    def _delete_below(self, folder: str) -> None:
        self._delete(self._names(f"{folder}/"))

    def _delete(self, names: Iterable[str]) -> None:
        for future in [self._root.write(name, None) for name in names]:
            future.result()


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
