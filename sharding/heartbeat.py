"""Which ranks are alive: every rank counts a number up in the common store, so that the others can tell a lost one."""

import threading
import time
import weakref
from typing import Any

import torch.distributed as dist

from ftrain.sharding.private import default_store

_PERIOD = 0.5
_ASKED = "ftrain/asked who is silent"


class Heartbeat:
    """A thread that counts while this process lives, is not stopped, and this object is held; needs
    torch.distributed.
    """

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

    def silent(self, *, seconds: float = 4 * _PERIOD, patience: float = 10.0) -> list[int]:
        """The ranks whose count does not move for so many `seconds`.

        Rank 0, which holds the store, waits until all that still count have asked too, at most `patience` seconds.
        Where the store is gone already, rank 0 is the silent one.
        """
        try:
            store = default_store().clone()
            before = [store.add(_key(rank), 0) for rank in range(self._world)]
            time.sleep(seconds)
            lost = [rank for rank in range(self._world) if store.add(_key(rank), 0) == before[rank]]
            store.add(_ASKED, 1)
            deadline = time.monotonic() + patience
            while self._rank == 0 and store.add(_ASKED, 0) < self._world - len(lost) and time.monotonic() < deadline:
                time.sleep(_PERIOD / 5)
        except dist.DistNetworkError:
            return [0]
        return lost


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
