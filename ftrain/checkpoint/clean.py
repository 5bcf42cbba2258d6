"""Delete checkpoints: on request and by retention."""

import logging

from ftrain.checkpoint.ages import kept, latest
from ftrain.checkpoint.folders import step_number
from ftrain.checkpoint.open_store import StoreLike, open_store
from ftrain.checkpoint.retention import Retention, to_delete
from ftrain.checkpoint.store import Store

_log = logging.getLogger("ftrain.checkpoint")
_STORAGE = (OSError, ValueError)  # of a file system, and of tensorstore


def delete(root: StoreLike, step: int) -> None:
    """Delete one step. If it is the latest, the newest other one becomes the latest, before anything is gone.

    Args:
        root: the folder of checkpoints, or its store.
        step: the step to delete.

    Raises:
        ValueError: there is no such step (those that are there are named), or `step` is no whole number.
        OSError: something of it cannot be deleted; it is no step any more even so.

    >>> import tempfile, torch
    >>> from ftrain.checkpoint import delete, latest, save, steps
    >>> folder = tempfile.mkdtemp()
    >>> for step in (1, 2):
    ...     save({"w": torch.zeros(2)}, folder, step)
    >>> delete(folder, 2)
    >>> steps(folder), latest(folder)
    ([1], 1)
    """
    step, store = step_number(step), open_store(root)
    here = store.steps()
    if step not in here:
        raise ValueError(f"{store.show()} holds no step {step}; it holds {', '.join(map(str, here)) or 'none'}")
    if latest(store) == step:
        others = [found.step for found in kept(store) if found.step != step]
        store.name_latest(others[-1] if others else None)
    store.delete(step)


def apply_retention(store: Store, keep: Retention) -> list[int]:
    """Delete the steps that `keep` does not ask for, never the latest, nor one whose manifest cannot be read: nobody
    knows what it is. Those deleted, ascending.

    What cannot be deleted is said and left: it must not hold up the saves.
    """
    if keep.last is None:
        return []
    try:
        known = [found for found in kept(store) if found.is_known]
        unwanted = to_delete(known, keep, protected=latest(store))
    except _STORAGE as error:
        _log.warning("the steps of %s could not be listed, so none was deleted: %s", store.show(), error)
        return []
    return [step for step in unwanted if _deleted(store, step)]


def _deleted(store: Store, step: int) -> bool:
    try:
        store.delete(step)
    except _STORAGE as error:
        _log.warning("step %d of %s could not be deleted: %s", step, store.show(), error)
        return False
    return True
