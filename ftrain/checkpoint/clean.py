"""Delete checkpoints: on request and by retention."""

import logging

from ftrain.checkpoint.ages import kept, latest
from ftrain.checkpoint.folders import step_number
from ftrain.checkpoint.place import Place
from ftrain.checkpoint.retention import Retention, to_delete
from ftrain.checkpoint.roots import Root, open_place

_log = logging.getLogger("ftrain.checkpoint")
_STORAGE = (OSError, ValueError)  # of a file system, and of tensorstore


def delete(root: Root, step: int) -> None:
    """Delete one step. If it is the latest, the newest other one becomes the latest, before anything is gone."""
    step, place = step_number(step), open_place(root)
    here = place.steps()
    if step not in here:
        raise ValueError(f"{place.show()} holds no step {step}; it holds {', '.join(map(str, here)) or 'none'}")
    if latest(place) == step:
        others = [found.step for found in kept(place) if found.step != step]
        place.name_latest(others[-1] if others else None)
    place.delete(step)


def apply_retention(place: Place, keep: Retention) -> list[int]:
    """Delete the steps that `keep` does not ask for, never the latest, nor one whose manifest cannot be read: nobody
    knows what it is. Those deleted, ascending.

    What cannot be deleted is said and left: it must not hold up the saves.
    """
    if keep.last is None:
        return []
    try:
        known = [found for found in kept(place) if found.is_known]
        unwanted = to_delete(known, keep, protected=latest(place))
    except _STORAGE as error:
        _log.warning("the steps of %s could not be listed, so none was deleted: %s", place.show(), error)
        return []
    return [step for step in unwanted if _deleted(place, step)]


def _deleted(place: Place, step: int) -> bool:
    try:
        place.delete(step)
    except _STORAGE as error:
        _log.warning("step %d of %s could not be deleted: %s", step, place.show(), error)
        return False
    return True
