"""Checkpoints in a folder of a file system: committed by a rename after everything is synced."""

import hashlib
import logging
import os
import shutil
from pathlib import Path

import tensorstore as ts

from ftrain.checkpoint.durable import make_folder, publish, remove_folder, sync_path, sync_tree, write_bytes, write_text
from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.folders import (
    LATEST,
    MANIFEST,
    discarded,
    leftovers,
    named_step,
    replaced,
    step_folder,
    step_name,
    steps_of,
    temporary,
)
from ftrain.checkpoint.lock import WriterLock
from ftrain.checkpoint.store import (
    HASHED_BYTES,
    MANIFEST_BYTES,
    NO_RECORDS,
    FileRecord,
    Files,
    HeldStep,
    KvSpec,
    Lock,
    NewStep,
    Records,
    Store,
    join,
)
from ftrain.files.beneath import Folder, NotPlain

_log = logging.getLogger("ftrain.checkpoint")
_POINTER_BYTES = 2**12


class LocalFolder(Store):
    """A folder below `root`; its layout is told in folders.py. In a run of several processes all must see it.

    A step that was put aside for a new version, whose process died before that took its name, is still the step.
    """

    def __init__(self, root: Path) -> None:
        """`root`: made by the first save. A relative one is meant from where the process is now.

        Raises:
            ValueError: no file of tensorstore can lie there: the path holds a NUL, or is not UTF-8.
        """
        if "\0" in str(root):
            raise ValueError(f"{str(root)!a} is no path: it holds a NUL")
        try:
            str(root).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{str(root)!a} is no UTF-8, and tensorstore opens no such path: rename the folder"
            ) from None
        # tensorstore refuses paths with `..`, which only the system can follow through links.
        self.root = Path(os.path.realpath(root)) if ".." in root.parts else root.absolute()

    def show(self, name: str = "") -> str:
        """The absolute path of a file, for messages."""
        return str(self.root / name)

    def steps(self) -> list[int]:
        """The committed steps, ascending; empty when there is no such folder. OSError if it cannot be listed."""
        if not self.root.is_dir():
            return []
        names = os.listdir(self.root)
        found = {step: step_name(step) for step in steps_of(names)}
        folders = {**replaced(names), **found}
        return sorted(step for step, name in folders.items() if (self.root / name / MANIFEST).is_file())

    def has(self, step: int) -> bool:
        """Whether a step is committed."""
        return step in self.steps()

    def hold(self, step: int) -> HeldStep:
        """Open a committed step; DamagedCheckpoint when it has no manifest, or one that cannot be read."""
        final = step_folder(self.root, step)
        try:
            return _HeldFolder(step, final)
        except DamagedCheckpoint:
            aside = replaced(os.listdir(self.root)).get(step) if self.root.is_dir() else None
            if aside is None or os.path.lexists(final):
                raise
            return _HeldFolder(step, self.root / aside)

    def delete(self, step: int) -> None:
        """Delete a step, its name first; of one that is not there nothing. OSError if something cannot be deleted."""
        final = step_folder(self.root, step)
        aside = replaced(os.listdir(self.root)).get(step)
        if os.path.lexists(final):
            remove_folder(final)
        elif aside is not None:
            remove_folder(self.root / aside)

    def named(self) -> int | None:
        """The step that the pointer names; None where it cannot be read or names none."""
        try:
            with Folder(self.root) as folder:
                return named_step(folder.read(LATEST, limit=_POINTER_BYTES))
        except (OSError, NotPlain):
            return None

    def name_latest(self, step: int | None) -> None:
        """Make the pointer name a step, or remove it; on the disk when this returns. OSError."""
        pointer = self.root / LATEST
        if pointer.is_dir() and not pointer.is_symlink():
            os.rename(pointer, discarded(pointer))  # nobody's hint: no file could take its name
        if step is not None:
            write_text(pointer, f"{step}\n")
        else:
            pointer.unlink(missing_ok=True)
            sync_path(self.root)

    def files(self, folder: str) -> list[str]:
        """The names of the files in a folder, in order; empty when there is no such folder."""
        here = self.root / folder
        return sorted(path.name for path in here.iterdir() if path.is_file()) if here.is_dir() else []

    def read(self, name: str, *, limit: int) -> bytes:
        """The content of a file of at most `limit` bytes.

        Raises:
            NotPlain: the name leads out of the folder, or to a link, a pipe, something larger.
            OSError: it is missing (FileNotFoundError) or cannot be read.
        """
        with Folder(self.root) as folder:
            return folder.read(name, limit=limit)

    def write(self, name: str, content: bytes) -> None:
        """Give a file this content at once, its folder made if need be; on the disk when this returns. OSError."""
        make_folder((self.root / name).parent)
        write_bytes(self.root / name, content)

    def lock(self) -> Lock:
        """Make the folder and take its lock; ValueError that names the holder when another run has it. OSError."""
        make_folder(self.root)
        return WriterLock(self.root)

    def begin(self, step: int) -> NewStep:
        """Begin a step under a temporary name, after removing leftovers; those that stay are logged. OSError."""
        _remove_leftovers(self.root)
        made = temporary(step_folder(self.root, step))
        made.mkdir()
        return self.begun(step, made.name)

    def begun(self, step: int, folder: str) -> NewStep:
        """The step that another process has begun in this folder."""
        return _NewFolder(self, step, folder)


class _HeldFolder(HeldStep):
    """A step's folder, held open: its files are never written again, and who deletes them leaves it without them."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self._path = path
        try:
            self._folder = Folder(path)
        except (FileNotFoundError, NotADirectoryError):
            raise _incomplete(path / MANIFEST) from None
        try:
            self.manifest = self._folder.read(MANIFEST, limit=MANIFEST_BYTES)
        except BaseException as error:
            self._folder.close()
            if isinstance(error, FileNotFoundError):
                raise _incomplete(path / MANIFEST) from None
            if isinstance(error, NotPlain | OSError):
                raise DamagedCheckpoint(f"{path / MANIFEST} cannot be read ({error}): restore another step") from error
            raise

    def show(self, name: str = "") -> str:
        return str(self._path / name)

    def kvstore(self, folder: str) -> KvSpec:
        return {"driver": "file", "path": f"{self._folder.system_path()}/{folder}/"}

    def context(self) -> ts.Context:
        return ts.Context()

    def wrong(self, base: str, files: Records, *, hashed: bool) -> tuple[str, str] | None:
        for name, record in files.items():
            found = self._differs(join([base, name]), record, hashed=hashed)
            if found:
                return name, found
        return None

    def require_plain(self, folder: str) -> None:
        try:
            self._folder.require_plain(folder)
        except NotPlain as error:
            raise DamagedCheckpoint(f"{error}: restore another step") from None
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{self.show(folder)} is missing: restore another step") from None
        except OSError as error:
            raise DamagedCheckpoint(f"{self.show(folder)} cannot be read ({error}): restore another step") from error

    def files(self, folder: str) -> Files:
        return _Below(self._folder, folder)

    def is_replaced(self) -> bool:
        return not self._folder.is_still(self._path)

    @property
    def is_frozen(self) -> bool:
        return self._folder.system_path() != str(self._path)

    def close(self) -> None:
        self._folder.close()

    def _differs(self, name: str, record: FileRecord, *, hashed: bool) -> str | None:
        try:
            size = self._folder.size(name)
            if record.bytes is not None and size != record.bytes:
                return f"has {size} bytes instead of {record.bytes}"
            if hashed and record.sha256 is not None:
                content = self._folder.read(name, limit=HASHED_BYTES)
                return None if record.sha256 == _digest(content) else "is damaged (its checksum is wrong)"
        except FileNotFoundError:
            return "is missing"
        except NotPlain as error:
            raise DamagedCheckpoint(f"{error}: restore another step") from None
        except OSError as error:
            raise DamagedCheckpoint(f"{self.show(name)} cannot be read ({error}): restore another step") from error
        return None


class _NewFolder(NewStep):
    """A step's folder under a temporary name."""

    base = ""

    def __init__(self, store: LocalFolder, step: int, folder: str) -> None:
        self.step, self.folder = step, folder
        self._store, self._path = store, store.root / folder

    def show(self, name: str = "") -> str:
        return str(self._path / name)

    def kvstore(self, folder: str) -> KvSpec:
        return {"driver": "file", "path": f"{self._path / folder}/"}

    def context(self) -> ts.Context:
        return ts.Context()

    def is_here(self) -> bool:
        return self._path.is_dir()

    def records(self, below: str = "", *, known: Records = NO_RECORDS) -> dict[str, FileRecord]:
        sync_tree(self._path / below)
        found = dict(known)
        for path in sorted(p for p in (self._path / below).rglob("*") if p.is_file()):
            name = path.relative_to(self._path).as_posix()
            if name not in known:
                size = path.stat().st_size
                found[name] = FileRecord(size, _digest(path.read_bytes()) if size <= HASHED_BYTES else None)
        return found

    def remove(self, name: str) -> None:
        (self._path / name).unlink()
        sync_path((self._path / name).parent)

    def commit(self, manifest: str) -> None:
        write_text(self._path / MANIFEST, manifest)
        publish(self._path, step_folder(self._store.root, self.step))
        self._store.name_latest(self.step)

    def abort(self) -> None:
        # On a full disk this makes room for the next try. An error here would hide the one that led here, and the next
        # save cleans up anyway.
        shutil.rmtree(self._path, ignore_errors=True)


class _Below:
    """The files below a folder of a held one."""

    def __init__(self, folder: Folder, below: str) -> None:
        self._folder, self._below = folder, below

    def open(self, name: str) -> int:
        return self._folder.open(join([self._below, name]))


def _remove_leftovers(root: Path) -> None:
    """Remove what interrupted saves and deletions have left; give a version that was put aside its name back."""
    for step, name in replaced(os.listdir(root)).items():
        if not os.path.lexists(step_folder(root, step)):
            os.rename(root / name, step_folder(root, step))
            sync_path(root)
    for path in leftovers(root):
        try:
            remove_folder(path)
        except OSError as error:  # it takes space, and does no other harm
            _log.warning("%s, which an interrupted save has left, could not be removed: %s", path, error)


def _incomplete(manifest: Path) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{manifest} is missing: this is not a complete checkpoint")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
