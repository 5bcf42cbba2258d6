"""From what a caller gives as the folder of checkpoints to its store, and what it holds."""

import os
from pathlib import Path

from ftrain.checkpoint import ages
from ftrain.checkpoint.bucket import Bucket
from ftrain.checkpoint.local import LocalFolder
from ftrain.checkpoint.store import Store

StoreLike = str | os.PathLike[str] | Store


def open_store(root: StoreLike) -> Store:
    """The store behind a path, a URL (`s3://bucket/folder`, `gs://...`, `memory://name`), or a store.

    Nothing is touched. An object store that needs more than its URL (an endpoint,
    credentials) is a `Bucket(url, options)`.

    Raises:
        ValueError: it is none of these, or a URL or path that no checkpoint can be saved at.

    >>> from ftrain.checkpoint import open_store
    >>> open_store("memory://runs/one").show("global_step_3")
    'memory://runs/one/global_step_3'
    """
    if isinstance(root, Store):
        return root
    if isinstance(root, str) and "://" in root:
        return Bucket(root)
    if not isinstance(root, str) and not (hasattr(root, "__fspath__") and isinstance(os.fspath(root), str)):
        raise ValueError(f"a store of checkpoints is a path, a URL or a Store, not {root!r}")
    return LocalFolder(Path(root))


def steps(root: StoreLike) -> list[int]:
    """The steps that `root` holds, ascending; empty when there is no such folder.

    Raises:
        ValueError: `root` is no path, URL or store; or an object store gives no answer.
        OSError: the folder cannot be listed.
    """
    return open_store(root).steps()


def latest(root: StoreLike) -> int | None:
    """The last committed step, or None when nothing was saved.

    It is the step that `latest_checkpointed_iteration.txt` names; where that file is missing or names a step that is
    not there (somebody moved it), the step that was written last. Raises what `steps` raises.

    >>> import tempfile
    >>> from ftrain.checkpoint import latest
    >>> latest(tempfile.mkdtemp()) is None
    True
    """
    return ages.latest(open_store(root))
