"""Checkpoints in a folder of a file system: committed by a rename after everything is synced."""

import hashlib
import os
import shutil
from pathlib import Path

import tensorstore as ts

from ftrain.checkpoint.durable import make_folder, publish, remove_folder, sync_path, sync_tree, write_bytes, write_text
from ftrain.checkpoint.folders import LATEST, MANIFEST, leftovers, named_step, step_folder, steps_of, temporary
from ftrain.checkpoint.lock import WriterLock
from ftrain.checkpoint.place import HASHED_BYTES, NO_RECORDS, FileRecord, KvSpec, Lock, Place, Records


class LocalFolder(Place):
    """A folder below `root`; its layout is told in folders.py. In a run of several processes all must see it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def show(self, name: str = "") -> str:
        return str(self.root / name)

    def kvstore(self, folder: str) -> KvSpec:
        return {"driver": "file", "path": f"{self.root / folder}/"}

    def context(self) -> ts.Context:
        return ts.Context()

    def steps(self) -> list[int]:
        if not self.root.is_dir():
            return []
        return [step for step in steps_of(os.listdir(self.root)) if (step_folder(self.root, step) / MANIFEST).is_file()]

    def latest(self) -> int | None:
        here = self.steps()
        try:
            named = named_step((self.root / LATEST).read_text())
        except (FileNotFoundError, NotADirectoryError):
            named = None
        return named if named in here else max(here, default=None)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def files(self, folder: str) -> list[str]:
        here = self.root / folder
        return sorted(path.name for path in here.iterdir() if path.is_file()) if here.is_dir() else []

    def write(self, name: str, content: bytes) -> None:
        make_folder((self.root / name).parent)
        write_bytes(self.root / name, content)

    def wrong(self, folder: str, files: Records, *, hashed: bool) -> tuple[str, str] | None:
        for name, record in files.items():
            found = _differs(self.root / folder / name, record, hashed=hashed)
            if found:
                return name, found
        return None

    def lock(self) -> Lock:
        make_folder(self.root)
        return WriterLock(self.root)

    def clean(self) -> None:
        for path in leftovers(self.root):
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink()

    def begin(self, step: int) -> str:
        made = temporary(step_folder(self.root, step))
        made.mkdir()
        return made.name

    def sees(self, folder: str) -> bool:
        return (self.root / folder).is_dir()

    def records(self, folder: str, below: str = "", *, known: Records = NO_RECORDS) -> dict[str, FileRecord]:
        made = self.root / folder
        sync_tree(made / below)
        found = dict(known)
        for path in sorted(p for p in (made / below).rglob("*") if p.is_file()):
            name = path.relative_to(made).as_posix()
            if name not in known:
                size = path.stat().st_size
                found[name] = FileRecord(size, _digest(path) if size <= HASHED_BYTES else None)
        return found

    def remove(self, name: str) -> None:
        (self.root / name).unlink()
        sync_path((self.root / name).parent)

    def commit(self, folder: str, step: int, manifest: str) -> None:
        made = self.root / folder
        write_text(made / MANIFEST, manifest)
        publish(made, step_folder(self.root, step))
        write_text(self.root / LATEST, f"{step}\n")

    def abort(self, folder: str) -> None:
        # On a full disk this makes room for the next try. An error here would hide the one that led here, and the next
        # save cleans up anyway.
        shutil.rmtree(self.root / folder, ignore_errors=True)

    def delete(self, step: int) -> None:
        others = [other for other in self.steps() if other != step]
        if self.latest() == step:
            if others:
                write_text(self.root / LATEST, f"{others[-1]}\n")
            else:
                (self.root / LATEST).unlink(missing_ok=True)
                sync_path(self.root)
        remove_folder(step_folder(self.root, step))


def _differs(path: Path, record: FileRecord, *, hashed: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if record.bytes is not None and size != record.bytes:
        return f"has {size} bytes instead of {record.bytes}"
    if hashed and record.sha256 is not None and record.sha256 != _digest(path):
        return "is damaged (its checksum is wrong)"
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
