"""Delete checkpoints: on request, by retention, and what a crash has left."""

import logging
from pathlib import Path

from ftrain.checkpoint import manifest as manifests
from ftrain.checkpoint.durable import remove_folder, sync_path, write_text
from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.folders import LATEST, latest, leftovers, step_folder, steps
from ftrain.checkpoint.retention import Retention, to_delete

_log = logging.getLogger("ftrain.checkpoint")


def delete(root: str | Path, step: int) -> None:
    """Delete one step. If it is the latest, the highest other one becomes the latest, before anything is gone."""
    root = Path(root)
    here = steps(root)
    if step not in here:
        raise ValueError(f"{root} holds no step {step}; it holds {', '.join(map(str, here)) or 'none'}")
    if latest(root) == step:
        others = [other for other in here if other != step]
        if others:
            write_text(root / LATEST, f"{others[-1]}\n")
        else:
            (root / LATEST).unlink(missing_ok=True)
            sync_path(root)
    remove_folder(step_folder(root, step))


def remove_leftovers(root: Path) -> None:
    """Remove what interrupted saves and deletions have left. Only for a process that holds the `WriterLock`."""
    for path in leftovers(root):
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink()


def apply_retention(root: Path, keep: Retention) -> list[int]:
    """Delete the steps that `keep` does not ask for, never the latest; the deleted ones, ascending."""
    measured = {step: _metrics(root, step) if keep.best else {} for step in steps(root)}
    unwanted = to_delete(measured, keep, protected=latest(root))
    for step in unwanted:
        delete(root, step)
    return unwanted


def _metrics(root: Path, step: int) -> dict[str, float]:
    try:
        return manifests.load(step_folder(root, step)).metrics
    except DamagedCheckpoint as error:
        _log.warning("%s: it is not counted among the best steps", error)
        return {}
