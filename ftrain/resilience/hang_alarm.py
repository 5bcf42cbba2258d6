"""One rank tells all others, through the common store, that the run hangs; and learns who has written its report.

Every call that asks the store may itself hang (its process may be stopped), so each has a thread that nobody must wait
for.
"""

import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from ftrain.sharding.private import default_store


class Alarm:
    """A bell that any rank rings and all hear. Without torch.distributed it is silent.

    `heard`: set once another rank has rung; `words`: what it said.
    """

    def __init__(self, *, period: float = 1.0) -> None:
        """Listens from now on; asks the store every `period` seconds."""
        self.heard = threading.Event()
        self.words = ""
        self._period = period
        self._end = threading.Event()
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._rank, self._world = (0, 1) if self._alone else (dist.get_rank(), dist.get_world_size())
        if not self._alone:
            # Counted, since the store may be that of an attempt before this one.
            number = default_store().add(f"ftrain/alarm/made/{self._rank}", 1)
            self._prefix = f"ftrain/alarm/{number}"
            self._listener = _thread(self._listen)

    def ring(self, words: str) -> None:
        """Tell all ranks; returns at once."""
        if not self._alone:
            _thread(lambda: default_store().clone().set(f"{self._prefix}/rung", words))

    def reported(self, *, seconds: float) -> list[int]:
        """Say that this rank has written its report, and wait up to `seconds` for the others: those that have not."""
        missing = set(range(self._world)) - {self._rank}
        if self._alone:
            return []

        def ask() -> None:
            store = default_store().clone()
            store.set(f"{self._prefix}/reported/{self._rank}", "")
            while missing:
                missing.difference_update(r for r in list(missing) if store.check([f"{self._prefix}/reported/{r}"]))
                time.sleep(0.1)

        _thread(ask).join(seconds)
        return sorted(missing)

    def close(self) -> None:
        """Listen no longer."""
        self._end.set()
        if not self._alone:
            self._listener.join(timeout=5.0)  # before the store goes, whose C++ would abort

    def _listen(self) -> None:
        store = default_store().clone()
        while not self._end.wait(self._period):
            if store.check([f"{self._prefix}/rung"]):
                self.words = store.get(f"{self._prefix}/rung").decode()
                self.heard.set()
                return


def _thread(function: Callable[[], None]) -> threading.Thread:
    def run() -> None:
        try:
            function()
        except (RuntimeError, dist.DistError):
            return  # the store went with the rank that held it: there is nobody to talk to

    thread = threading.Thread(target=run, name="ftrain alarm", daemon=True)
    thread.start()
    return thread
