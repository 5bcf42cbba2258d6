"""From what a caller gives as the folder of checkpoints to the place, and what it holds."""

import os
from pathlib import Path

from ftrain.checkpoint import ages
from ftrain.checkpoint.bucket import Bucket
from ftrain.checkpoint.local import LocalFolder
from ftrain.checkpoint.place import Place

Root = str | os.PathLike[str] | Place


def open_place(root: Root) -> Place:
    """The place behind a path, a URL (`s3://bucket/folder`, `gs://...`, `memory://name`), or a place.

    Nothing is touched. A store that needs more than its URL, an endpoint or credentials, is a `Bucket(url, options)`.

    Raises:
        ValueError: it is none of these, or a URL or path that no checkpoint can be saved at.
    """
    if isinstance(root, Place):
        return root
    if isinstance(root, str) and "://" in root:
        return Bucket(root)
    if not isinstance(root, str) and not (hasattr(root, "__fspath__") and isinstance(os.fspath(root), str)):
        raise ValueError(f"a place for checkpoints is a path, a URL or a Place, not {root!r}")
    return LocalFolder(Path(root))


def steps(root: Root) -> list[int]:
    """The steps that `root` holds, ascending; empty when there is no such folder."""
    return open_place(root).steps()


def latest(root: Root) -> int | None:
    """The last committed step, or None when nothing was saved.

    It is the step that `latest_checkpointed_iteration.txt` names; where that file is missing or names a step that is
    not there (somebody moved it), the step that was written last.
    """
    return ages.latest(open_place(root))
