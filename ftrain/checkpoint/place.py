"""Where a run's checkpoints live: what the rest of this package needs of a folder or of a bucket."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tensorstore as ts

KvSpec = dict[str, Any]
HASHED_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file: its size in bytes (None where asking for it means reading it), and the SHA-256 of those that are small
    (large ones carry a crc32c per chunk).
    """

    bytes: int | None
    sha256: str | None


Records = Mapping[str, FileRecord]
NO_RECORDS: Records = MappingProxyType({})


class Place(ABC):
    """A folder of checkpoints. Names of files and folders are relative to it, with `/` between their parts.

    The order of a save is the same everywhere: `begin`, the data, `records`, `commit`; after a failure `abort`. What is
    not committed is invisible to `steps`, and `clean` removes it.
    """

    @abstractmethod
    def show(self, name: str = "") -> str:
        """The full name of a file, for messages."""

    @abstractmethod
    def kvstore(self, folder: str) -> KvSpec:
        """A folder as a spec of tensorstore; its `path` ends with a slash."""

    @abstractmethod
    def context(self) -> ts.Context:
        """A fresh context for one save or one restore; what is opened with one context shares one database."""

    @abstractmethod
    def steps(self) -> list[int]:
        """The committed steps, ascending."""

    @abstractmethod
    def latest(self) -> int | None:
        """The last committed step: the one that `latest_checkpointed_iteration.txt` names; where that file is missing
        or names a step that is not there (somebody moved it), the highest.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a small file; FileNotFoundError."""

    @abstractmethod
    def files(self, folder: str) -> list[str]:
        """The names of the files in a folder, those of its sub-folders left out; empty when there is no such folder."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Give a small file beside the steps this content: a reader sees the old one or the new one."""

    @abstractmethod
    def wrong(self, folder: str, files: Records, *, hashed: bool) -> tuple[str, str] | None:
        """The first of a folder's files that is not as recorded, and how: "is missing", "has 3 bytes instead of 5", ...
        `hashed`: read the small ones and compare their hashes.
        """

    @abstractmethod
    def lock(self) -> "Lock":
        """Make the folder and take the right to write into it; ValueError when another run has it."""

    @abstractmethod
    def clean(self) -> None:
        """Remove what interrupted saves and deletions have left. Only for the holder of the lock."""

    @abstractmethod
    def begin(self, step: int) -> str:
        """The folder to write a step into, which nobody has written into."""

    @abstractmethod
    def sees(self, folder: str) -> bool:
        """Does this process see a folder that another one has begun?"""

    @abstractmethod
    def records(self, folder: str, below: str = "", *, known: Records = NO_RECORDS) -> dict[str, FileRecord]:
        """Sync and record the files of a folder, by name relative to it; only those below a sub-folder, if given.
        Those that are `known` are taken as they are.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove one file of a step that is not committed."""

    @abstractmethod
    def commit(self, folder: str, step: int, manifest: str) -> None:
        """Write the manifest into `folder`, make this the step, and then make it the latest. Each happens or not."""

    @abstractmethod
    def abort(self, folder: str) -> None:
        """Remove what was written into `folder`, as far as possible."""

    @abstractmethod
    def delete(self, step: int) -> None:
        """Delete a committed step. If it is the latest, the highest other one becomes the latest before anything is
        gone.
        """


class Lock(ABC):
    """The right to write into a place."""

    @abstractmethod
    def release(self) -> None:
        """Let others write."""


def base_of(folder: str, step_folder: str) -> str:
    """The manifest's `base` of a step that is written into `folder`."""
    inner = folder.removeprefix(step_folder)
    return inner.removeprefix("/") if inner.startswith("/") else ""


def join(parts: Sequence[str]) -> str:
    """A name from its parts, empty ones left out."""
    return "/".join(part for part in parts if part)
