"""Ranks end together: when one fails, or calls something else than the others, all print why and end.

A rank that fails leaves a message in the common store, and stays until the others have read it. Each of them has a
thread that looks for one. The main thread may wait in C++ for the rank that failed, so the thread ends the process.

A rank that leaves the block early, saves alone or skips a step lets the others wait for it, and then waits for them.
So a rank that has made no joint call for some seconds publishes the log of those that it has made
(`ftrain.sharding.joint_calls`), and compares it with rank 0's.
"""

import json
import os
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from ftrain.run.ranks import held_by_agent
from ftrain.sharding.joint_calls import JointCall, calls_made, first_difference, last_calls
from ftrain.sharding.private import default_store

_PERIOD, _GRACE, _PATIENCE, _WAITING = 0.25, 1.0, 5.0, 3.0
_FAILED, _HEARD, _DONE, _SEEN = (f"ftrain/run/{word}" for word in ("failed", "heard", "done", "seen"))
_STEPS = "began step "
_STORE_IS_GONE = (RuntimeError, dist.DistError)
"""What a call of the store raises when the rank that held it has ended."""


def began_step(number: int) -> str:
    """The words of `run.steps` when a rank begins a step, for `joint_call`."""
    return f"{_STEPS}{number} of run.steps"


class PeerRanks:
    """The other ranks of torch.distributed; each rank makes one of these. Without process group there are none."""

    def __init__(self) -> None:
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        if self._alone:
            return
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._before = calls_made()
        self._store = default_store().clone()  # later there may be nobody to connect with
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
        words = f"rank {self._rank} {_in_words(error)}"
        try:
            if self._store.compare_set(_FAILED, "", words).decode() == words:
                _wait_for_readers(self._store, self._world - 1)
            self._store.add(_HEARD, 1)
        except _STORE_IS_GONE:
            return  # the store ended with the run

    def finished(self) -> None:
        """Return when all ranks have come here, or where the torchrun that held the store has ended. A rank that fails
        before ends this one. RuntimeError if the rank that holds the store ends before.
        """
        if self._alone:
            return
        try:
            self._store.add(_DONE, 1)
            while self._store.add(_DONE, 0) < self._world:
                time.sleep(_PERIOD / 5)
            self._store.add(_SEEN, 1)
            if self._rank == 0:  # where no agent holds the store it ends with this rank
                _wait_for_readers(self._store, self._world, _SEEN)
        except _STORE_IS_GONE as error:
            self._end.set()
            self._alone = True  # there is nobody to tell
            if held_by_agent():
                return
            raise RuntimeError(
                f"rank {self._rank} is done, and the rank that holds the store ended before all ranks were"
            ) from error
        self._stop_listening()

    def _stop_listening(self) -> None:
        if not self._alone:
            self._end.set()
            self._thread.join()

    def _listen(self) -> None:
        try:
            store, published, since = default_store().clone(), -1, time.monotonic()
            made = calls_made()
            while not self._end.wait(_PERIOD):
                if store.check([_FAILED]):
                    words = store.get(_FAILED).decode()
                    if not self._end.wait(_GRACE):  # a rank's own error says more: give it time to arrive
                        self._leave(store, words)
                    return
                if calls_made() != made:
                    made, since = calls_made(), time.monotonic()
                elif time.monotonic() > since + _WAITING:
                    if published != made:
                        published = made
                        store.set(_calls(self._rank), json.dumps(self._own_calls()))
                    self._compare(store)
        except _STORE_IS_GONE:
            return  # the store ended with the run

    def _own_calls(self) -> list[JointCall]:
        """The last joint calls within the block, whose first one has the number 1."""
        return [JointCall(n - self._before, what) for n, what in last_calls() if n > self._before]

    def _compare(self, store: dist.Store) -> None:
        """Tell all ranks to end where this one, which waits, has called something else than rank 0, which waits too."""
        if self._rank == 0 or not store.check([_calls(0)]):
            return
        own = self._own_calls()
        differ = first_difference(own, [JointCall(*call) for call in json.loads(store.get(_calls(0)))])
        if differ is not None:
            before = [what for n, what in own if n < differ[0].number and what.startswith(_STEPS)]
            when = f"after both {before[-1]}, " if before else ""
            store.compare_set(
                _FAILED,
                "",
                f"{when}rank {self._rank} {differ[0].what} and rank 0 {differ[1].what}, so each waits for the other: "
                "all ranks must make the same calls in the same order, with arguments of the same shapes",
            )

    def _leave(self, store: dist.Store, words: str) -> None:
        sys.stdout.flush()
        print(f"rank {self._rank} ends: {words}", file=sys.stderr, flush=True)
        with suppress(*_STORE_IS_GONE):  # the rank that held it has ended before
            store.add(_HEARD, 1)
            if self._rank == 0:  # where no agent holds the store it ends with this rank
                _wait_for_readers(store, self._world)
        os._exit(1)


def _wait_for_readers(store: dist.Store, ranks: int, key: str = _HEARD) -> None:
    """Return when so many ranks have read why they end, or what else `key` counts, or after some seconds."""
    deadline = time.monotonic() + _PATIENCE
    while store.add(key, 0) < ranks and time.monotonic() < deadline:
        time.sleep(_PERIOD / 5)


def _in_words(error: BaseException) -> str:
    if isinstance(error, SystemExit) and not error.code:
        return "left the session alone, by sys.exit"
    return f"failed with {type(error).__name__}: {error}".strip(": ")


def _calls(rank: int) -> str:
    return f"ftrain/run/calls/{rank}"
