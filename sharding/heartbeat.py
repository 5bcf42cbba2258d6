"""Who is still there: every rank counts up a number in the common store, so that the others can tell a lost one."""

import threading
import time

import torch.distributed as dist

from sharding.private import default_store

_PERIOD = 0.5


class Heartbeat:
    """A thread that counts while this process lives and is not stopped. One per process group."""

    def __init__(self) -> None:
        # A store of its own: a wait of the main thread must not hold the beat up.
        self._store = default_store().clone()
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ftrain heartbeat", daemon=True)
        self._thread.start()

    def silent(self, *, seconds: float = 4 * _PERIOD) -> list[int]:
        """The ranks whose count does not move for so long."""
        store = default_store().clone()
        before = [store.add(_key(rank), 0) for rank in range(self._world)]
        time.sleep(seconds)
        return [rank for rank in range(self._world) if store.add(_key(rank), 0) == before[rank]]

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(_PERIOD):
            try:
                self._store.add(_key(self._rank), 1)
            except (RuntimeError, dist.DistError):
                return  # the store went with the run


def _key(rank: int) -> str:
    return f"ftrain/alive/{rank}"
