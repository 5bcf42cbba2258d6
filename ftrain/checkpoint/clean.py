"""Delete checkpoints: on request and by retention."""

import logging

from ftrain.checkpoint import manifest as manifests
from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.place import Place
from ftrain.checkpoint.retention import Retention, to_delete
from ftrain.checkpoint.roots import Root, open_place

_log = logging.getLogger("ftrain.checkpoint")


def delete(root: Root, step: int) -> None:
    """Delete one step. If it is the latest, the highest other one becomes the latest, before anything is gone."""
    place = open_place(root)
    here = place.steps()
    if step not in here:
        raise ValueError(f"{place.show()} holds no step {step}; it holds {', '.join(map(str, here)) or 'none'}")
    place.delete(step)


def apply_retention(place: Place, keep: Retention) -> list[int]:
    """Delete the steps that `keep` does not ask for, never the latest; the deleted ones, ascending."""
    measured = {step: _metrics(place, step) if keep.best else {} for step in place.steps()}
    unwanted = to_delete(measured, keep, protected=place.latest())
    for step in unwanted:
        place.delete(step)
    return unwanted


def _metrics(place: Place, step: int) -> dict[str, float]:
    try:
        return manifests.load(place, step).metrics
    except DamagedCheckpoint as error:
        _log.warning("%s: it is not counted among the best steps", error)
        return {}
