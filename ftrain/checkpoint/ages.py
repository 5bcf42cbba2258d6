"""Which of the committed steps are old and which are new: told by when they were written, not by their numbers.

A run may go back: after steps 4000 and 5000 it goes on from 4000 and saves 4010, which is newer than 5000.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ftrain.checkpoint import manifest as manifests
from ftrain.checkpoint.store import Store

_log = logging.getLogger("ftrain.checkpoint")
ORDERS = 2**63 - 1
"""The highest order. Of steps that have it (a manifest may say anything) the highest step is the newest."""


@dataclass(frozen=True)
class Kept:
    """What is known of a committed step: its manifest's `order`, `good` and `metrics`."""

    step: int
    order: int = 0
    good: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        """Whether its manifest could be read."""
        return self.order >= 0


def kept(store: Store) -> list[Kept]:
    """The committed steps from the oldest to the newest. Those whose manifest cannot be read count as the oldest; of
    those from before there was an order, the highest step is the newest.
    """
    return sorted((_look(store, step) for step in store.steps()), key=lambda found: (found.order, found.step))


def latest(store: Store) -> int | None:
    """The last committed step: the one that `latest_checkpointed_iteration.txt` names; where that file is missing,
    cannot be read, or names a step that is not there (somebody moved it), the newest.
    """
    here, named = store.steps(), store.named()
    if named is not None and (named in here or store.has(named)):
        return named
    if not here:
        return None
    return here[0] if len(here) == 1 else kept(store)[-1].step


def next_order(store: Store) -> int:
    """The order of a step that is written now: above all others', also where the clock has gone back.

    The latest has the highest order, but where a run went back: then the steps it left behind, whose numbers are
    higher, may have a higher one.
    """
    last = latest(store)
    if last is None:
        return time.time_ns()
    known = [last] if not any(step > last for step in store.steps()) else store.steps()
    return min(ORDERS, max(time.time_ns(), *(_look(store, step).order + 1 for step in known)))


def _look(store: Store, step: int) -> Kept:
    try:
        found = manifests.load(store, step)
    except (ValueError, OSError) as error:
        _log.warning("%s: it counts as the oldest step", error)
        return Kept(step, order=-1, good=False)
    return Kept(step, found.order, found.good, found.metrics)
