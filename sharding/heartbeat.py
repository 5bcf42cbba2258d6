"""Who is still there: every rank counts up a number in the common store, so that the others can tell a lost one."""

import threading
import time
import weakref
from typing import Any

import torch.distributed as dist

from sharding.private import default_store

_PERIOD = 0.5


class Heartbeat:
    """A thread that counts while this process lives, is not stopped, and this object is held."""

    def __init__(self) -> None:
        # A store of its own: a wait of the main thread must not hold the beat up.
        self._store = default_store().clone()
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        stop = threading.Event()
        thread = threading.Thread(
            target=_beat, args=(self._store, _key(self._rank), stop), name="ftrain heartbeat", daemon=True
        )
        thread.start()
        # Before the interpreter ends, too: it would unwind the thread within the store's C++, which aborts.
        self.stop = weakref.finalize(self, _end, stop, thread)

    def silent(self, *, seconds: float = 4 * _PERIOD) -> list[int]:
        """The ranks whose count does not move for so long."""
        store = default_store().clone()
        before = [store.add(_key(rank), 0) for rank in range(self._world)]
        time.sleep(seconds)
        return [rank for rank in range(self._world) if store.add(_key(rank), 0) == before[rank]]


def _beat(store: Any, key: str, stop: threading.Event) -> None:
    while not stop.wait(_PERIOD):
        try:
            store.add(key, 1)
        except (RuntimeError, dist.DistError):
            return  # the store went with the run


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(timeout=5.0)  # a store whose process is stopped does not answer


def _key(rank: int) -> str:
    return f"ftrain/alive/{rank}"
