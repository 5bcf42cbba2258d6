"""Where a run's checkpoints live: what the rest of this package needs of a folder or of a bucket."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Protocol

import tensorstore as ts

KvSpec = dict[str, Any]
HASHED_BYTES = 2**20
MANIFEST_BYTES = 2**28
"""A manifest is no longer: some million leaves and files."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file: its size in bytes (None where asking for it means reading it), and the SHA-256 of those that are small
    (large ones carry a crc32c per chunk).
    """

    bytes: int | None
    sha256: str | None


Records = Mapping[str, FileRecord]
NO_RECORDS: Records = MappingProxyType({})


class Store(ABC):
    """A folder of checkpoints, in a file system or a bucket. Names of files and folders are relative to it, with `/`
    between their parts.

    A committed step is read through a `HeldStep`, a new one is written through a `NewStep`.
    """

    @abstractmethod
    def show(self, name: str = "") -> str:
        """The full name of a file, for messages."""

    @abstractmethod
    def steps(self) -> list[int]:
        """The committed steps, ascending."""

    @abstractmethod
    def has(self, step: int) -> bool:
        """Whether a step is committed, asked for by its name: also where it is not, or not yet, listed."""

    @abstractmethod
    def hold(self, step: int) -> "HeldStep":
        """Open a committed step, to be closed by the caller; DamagedCheckpoint when it has no manifest."""

    @abstractmethod
    def delete(self, step: int) -> None:
        """Delete a committed step that is not the latest; of one that is not there nothing."""

    @abstractmethod
    def named(self) -> int | None:
        """The step that `latest_checkpointed_iteration.txt` names; None where it cannot be read or names none. It is a
        hint: the step need not be there.
        """

    @abstractmethod
    def name_latest(self, step: int | None) -> None:
        """Make `latest_checkpointed_iteration.txt` name a step, or remove it."""

    @abstractmethod
    def files(self, folder: str) -> list[str]:
        """The names of the files in a folder, those of its sub-folders left out; empty when there is no such folder."""

    @abstractmethod
    def read(self, name: str, *, limit: int) -> bytes:
        """The content of a small file, of at most `limit` bytes; FileNotFoundError."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Give a small file beside the steps this content: a reader sees the old one or the new one."""

    @abstractmethod
    def lock(self) -> "Lock":
        """Make the folder and take the right to write into it; ValueError when another run has it."""

    @abstractmethod
    def begin(self, step: int) -> "NewStep":
        """Remove what interrupted saves and deletions have left, and begin to write a step, into a folder that nobody
        has written into. Only for the holder of the lock.
        """

    @abstractmethod
    def begun(self, step: int, folder: str) -> "NewStep":
        """The step that another process has begun in this `folder`. Nothing is touched."""


class StepFolder(ABC):
    """One step, read or written. Names are relative to its folder, or to a folder in it."""

    step: int

    @abstractmethod
    def show(self, name: str = "") -> str:
        """The full name of a file, for messages."""

    @abstractmethod
    def kvstore(self, folder: str) -> KvSpec:
        """A folder as a spec of tensorstore; its `path` ends with a slash."""

    @abstractmethod
    def context(self) -> ts.Context:
        """A fresh context for one save or one restore; what is opened with one context shares one database."""


class HeldStep(StepFolder):
    """A committed step, as it was when it was opened: whoever replaces or deletes it meanwhile, what is read through
    this is of one version, or an error. A context manager.
    """

    manifest: bytes
    """The content of its manifest."""

    @abstractmethod
    def wrong(self, base: str, files: Records, *, hashed: bool) -> tuple[str, str] | None:
        """The first of these files below `base` that is not as recorded, and how: "is missing", "has 3 bytes instead of
        5", ... `hashed`: read the small ones and compare their hashes. DamagedCheckpoint for what is no file.
        """

    @abstractmethod
    def require_plain(self, folder: str) -> None:
        """DamagedCheckpoint if the folder holds something else than folders and regular files, such as a link: readers
        that open names by themselves would follow it.
        """

    @abstractmethod
    def files(self, folder: str) -> "Files | None":
        """The files of a folder, to be read straight; None where only tensorstore can."""

    @abstractmethod
    def is_replaced(self) -> bool:
        """Whether the store now holds another version of the step, or none."""

    @property
    @abstractmethod
    def is_frozen(self) -> bool:
        """Whether what was read is of one version even though the step has been replaced since."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""

    def __enter__(self) -> "HeldStep":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Files(Protocol):
    """Regular files below a folder."""

    def open(self, name: str) -> int:
        """A descriptor of a file, for reading, which the caller closes; NotPlain for what is no file of the folder,
        OSError.
        """


class NewStep(StepFolder):
    """A step that is being written: the data, `records`, `commit`; after a failure `abort`.

    What is not committed is invisible to `Store.steps`, and the next `Store.begin` removes it.
    """

    folder: str
    """Its name in the store until the commit, by which other processes find it (`Store.begun`)."""
    base: str
    """What the manifest says: where in the committed step's folder this one's files will be."""

    @abstractmethod
    def is_here(self) -> bool:
        """Does this process see the folder, which another one may have made?"""

    @abstractmethod
    def records(self, below: str = "", *, known: Records = NO_RECORDS) -> dict[str, FileRecord]:
        """Sync and record the files, by name; only those below a sub-folder, if given. Those that are `known` are taken
        as they are.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove one file."""

    @abstractmethod
    def commit(self, manifest: str) -> None:
        """Write the manifest, make this the step, and then make it the latest. Each happens or not."""

    @abstractmethod
    def abort(self) -> None:
        """Remove what was written, as far as possible."""


class Lock(ABC):
    """The right to write into a store."""

    @abstractmethod
    def is_held(self) -> bool:
        """Whether nobody else can have it: not after somebody has removed what it is kept in."""

    @abstractmethod
    def release(self) -> None:
        """Let others write."""


def join(parts: Sequence[str]) -> str:
    """A name from its parts, empty ones left out."""
    return "/".join(part for part in parts if part)
