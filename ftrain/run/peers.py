"""Ranks end together: when one fails, the others print why and end too, wherever they wait.

A rank that fails leaves a message in the common store, and stays until the others have read it. Each of them has a
thread that looks for one. The main thread may wait in C++ for the rank that failed, so the thread ends the process.
"""

import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from ftrain.sharding.private import default_store

_PERIOD, _GRACE, _PATIENCE = 0.25, 1.0, 5.0
_FAILED, _HEARD, _DONE = "ftrain/run/failed", "ftrain/run/heard", "ftrain/run/done"


class PeerRanks:
    """The other ranks of torch.distributed; each rank makes one of these. Without process group there are none."""

    def __init__(self) -> None:
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        if self._alone:
            return
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="ftrain peers", daemon=True)
        self._thread.start()

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank ends with this error, unless another one has reported an error before. Returns
        when they have read it, or after some seconds.
        """
        self._stop_listening()
        if self._alone:
            return
        words = f"rank {self._rank} failed with {type(error).__name__}: {error}".strip(": ")
        try:
            store = default_store().clone()
            if store.compare_set(_FAILED, "", words).decode() != words:
                store.add(_HEARD, 1)
                return
            deadline = time.monotonic() + _PATIENCE
            while store.add(_HEARD, 0) < self._world - 1 and time.monotonic() < deadline:
                time.sleep(_PERIOD / 5)
        except (RuntimeError, dist.DistError):
            return  # the store ended with the run

    def finished(self) -> None:
        """Return when all ranks have come here. A rank that fails before ends this one."""
        if self._alone:
            return
        store = default_store().clone()
        store.add(_DONE, 1)
        try:
            while store.add(_DONE, 0) < self._world:
                time.sleep(_PERIOD / 5)
        except (RuntimeError, dist.DistError):
            pass  # rank 0, which holds the store, has seen all ranks and ended
        self._stop_listening()

    def _stop_listening(self) -> None:
        if not self._alone:
            self._end.set()
            self._thread.join()

    def _listen(self) -> None:
        try:
            store = default_store().clone()
            while not self._end.wait(_PERIOD):
                if store.check([_FAILED]):
                    words = store.get(_FAILED).decode()
                    if not self._end.wait(_GRACE):  # a rank's own error says more: give it time to arrive
                        store.add(_HEARD, 1)
                        self._leave(words)
                    return
        except (RuntimeError, dist.DistError):
            return  # the store ended with the run

    def _leave(self, words: str) -> Any:
        sys.stdout.flush()
        print(f"rank {self._rank} ends: {words}", file=sys.stderr, flush=True)
        os._exit(1)
