"""The objects of a bucket below one prefix: read, written, listed and deleted through a kvstore of tensorstore."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import tensorstore as ts

from ftrain.checkpoint.store import KvSpec, join

_DRIVERS = {"s3": "s3", "gs": "gcs", "memory": "memory"}
_ATTEMPTS = 6
PATIENCE = 300.0
"""Seconds that a store may take to answer about small objects."""


class Objects:
    """What lies below a URL; names are relative to it. `store` is open for as long as this object lives."""

    def __init__(self, url: str, options: Mapping[str, Any], *, patience: float = PATIENCE) -> None:
        """`url`, `options` and `patience` (seconds) as for `Bucket`.

        Raises:
            ValueError: the URL is none of those that `Bucket` takes, or tensorstore refuses the options.
        """
        self._patience = patience
        found = urlsplit(url)
        if found.scheme not in _DRIVERS or not found.netloc:
            known = ", ".join(f"{scheme}://..." for scheme in _DRIVERS)
            raise ValueError(f"{url!r} is no store of checkpoints: give a path, or one of {known}")
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
        self.store = ts.KvStore.open(self.kvstore(""), context=self.context()).result()

    def show(self, name: str = "") -> str:
        """The URL of an object, for messages."""
        return join([self._url, name])

    def kvstore(self, folder: str) -> KvSpec:
        """What lies below a folder as a spec of tensorstore."""
        return {**self._spec, "path": self._path + (f"{folder}/" if folder else "")}

    def context(self) -> ts.Context:
        """A fresh context, which sees the same objects."""
        return ts.Context({"cache_pool": {}}, self._shared)

    def names(self, prefix: str) -> list[str]:
        """The names of all objects that begin so, in order. TimeoutError if the store does not answer."""
        beyond = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        return sorted(
            key.decode() for key in self._answer(self.store.list(ts.KvStore.KeyRange(prefix, beyond)), prefix)
        )

    def get(self, name: str) -> bytes | None:
        """The content of an object; None when there is no such object. TimeoutError as `contents`."""
        return self.contents([name])[0]

    def contents(self, names: Sequence[str]) -> list[bytes | None]:
        """The contents of small objects, asked for all at once; None for those that are not there.

        Raises:
            TimeoutError: the store has not answered for `patience` seconds; the object is named.
        """
        asked = [self.store.read(name) for name in names]
        answers = [self._answer(future, name) for future, name in zip(asked, names, strict=True)]
        return [answer.value if answer.state == "value" else None for answer in answers]

    def settled(self, names: Sequence[str]) -> list[bytes]:
        """The contents of objects that have just been written, each read until two answers in a row agree; OSError.

        A store may answer wrongly, or not know yet what it has listed. What is read here goes into the manifest, which
        is then believed; so one answer is not.
        """
        found: list[bytes | None] = [None] * len(names)
        unsettled = list(range(len(names)))
        for attempt in range(_ATTEMPTS):
            time.sleep(0.0 if attempt < 2 else 0.1 * 2**attempt)
            answers = self.contents([names[i] for i in unsettled])
            for i, content in zip(list(unsettled), answers, strict=True):
                if content is not None and content == found[i]:
                    unsettled.remove(i)
                found[i] = content
            if not unsettled:
                return [content for content in found if content is not None]
        raise OSError(f"{self.show(names[unsettled[0]])} was written, but is missing or differs at each reading")

    def put(self, name: str, content: bytes) -> None:
        """Give an object this content at once: a reader sees the old one or the new one. TimeoutError as `contents`."""
        self._answer(self.store.write(name, content), name)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, all at once; those that are not there are no error. TimeoutError as `contents`."""
        for name, future in [(name, self.store.write(name, None)) for name in names]:
            self._answer(future, name)

    def _answer(self, future: Any, name: str) -> Any:
        """What the store answers; TimeoutError for one that takes connections and says nothing."""
        try:
            return future.result(timeout=self._patience)
        except TimeoutError:
            raise TimeoutError(
                f"{self.show(name)}: the store has not answered for {self._patience:g} s: look at its endpoint and the "
                "network, then try again"
            ) from None


def _of_environment() -> KvSpec:
    """What tensorstore does not read from the environment by itself: a server of one's own."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return {
        **({"endpoint": endpoint} if endpoint else {}),
        **({"aws_region": region} if region else {}),
    }
