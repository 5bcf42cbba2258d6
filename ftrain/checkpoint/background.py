"""The write of one save behind the training loop: its copy of the state, its thread, and how it failed."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from ftrain.checkpoint import ages
from ftrain.checkpoint.errors import SaveFailed
from ftrain.checkpoint.leaves import Leaves
from ftrain.checkpoint.snapshot import Spare
from ftrain.checkpoint.store import Store
from ftrain.graph.host_waits import expected_wait
from ftrain.runtime.borrow import Borrow

_log = logging.getLogger("ftrain.checkpoint")
PATIENCE = 1800.0
"""Seconds that a write or a read may take before a watchdog takes it for a hang."""

Write = Callable[[Callable[[], Leaves]], None]
"""Writes a save; it is given what takes the leaves, or raises why they cannot be had."""


class BackgroundWriter:
    """One write at a time. What goes wrong in it is kept for the next `wait` of the training loop."""

    def __init__(self, store: Store) -> None:
        """`store`: where the writes go, for messages."""
        self._store = store
        self._spare = Spare()
        self._borrow: Borrow | None = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None

    def reserve(self, leaves: Leaves) -> None:
        """Make the memory for the copy of these leaves."""
        self._spare.reserve(leaves)

    def give_memory_back(self) -> None:
        """Let go of the memory for copies."""
        self._spare = Spare()

    @property
    def waited(self) -> float:
        """Seconds for which steps or other code have waited for the copy of their state, in the last save."""
        return 0.0 if self._borrow is None else self._borrow.waited

    def forget_waits(self) -> None:
        """Count `waited` from 0 again."""
        self._borrow = None

    def run(self, step: int, leaves: Leaves, write: Write) -> None:
        """Write now, from the leaves' own memory; what goes wrong is raised by `wait`."""
        self._guarded(step, lambda: leaves, write)

    def start(self, step: int, leaves: Leaves, state: Mapping[str, Any], write: Write) -> None:
        """Write in a thread, from a copy: the leaves of `state` (see `Spare.borrow`) are borrowed until it is made.

        Raises:
            RuntimeError: no thread can be started.
        """
        snapshot = self._spare.borrow(leaves, state)
        self._borrow = snapshot.borrow
        self._thread = threading.Thread(
            target=self._guarded, args=(step, snapshot.take, write), name=f"checkpoint step {step}"
        )
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None
            snapshot.borrow.end()
            raise

    @property
    def is_running(self) -> bool:
        """Whether a write goes on."""
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        """Return when the last write has ended, however."""
        if self._thread is not None:
            with expected_wait(f"the save of {self._thread.name}", seconds=PATIENCE):
                self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Return when the last write has ended.

        Raises:
            SaveFailed: it has failed; raised once.
        """
        self.join()
        if self._failure is not None:
            step, cause = self._failure
            self._failure = None
            raise save_failed(self._store, step, cause) from cause

    def forget_failure(self) -> None:
        """As `wait`, but raises nothing."""
        self.join()
        self._failure = None

    def _guarded(self, step: int, take: Callable[[], Leaves], write: Write) -> None:
        leaves = _taken(take)
        try:
            write(leaves.result)
        except BaseException as cause:
            _log.error("saving step %d into %s failed: %s", step, self._store.show(), cause)
            self._failure = (step, cause)


def save_failed(store: Store, step: int, cause: BaseException) -> SaveFailed:
    """The error to raise: what failed, what is still there, and what to do."""
    try:
        good = ages.latest(store)
        kept = "no step was saved before" if good is None else f"the last good step is {good}"
    except (OSError, ValueError) as error:  # ValueError: of an object store
        kept = f"which steps are there cannot be read ({error})"
    return SaveFailed(
        f"saving step {step} into {store.show()} failed: {cause}; {kept}, and the state in memory is unharmed: "
        "free space or mend the folder, then save again"
    )


def _taken(take: Callable[[], Leaves]) -> "Future[Leaves]":
    """The leaves, or what went wrong: the borrow ends before other ranks are heard, and they hear of an error."""
    found: Future[Leaves] = Future()
    try:
        found.set_result(take())
    except BaseException as error:
        found.set_exception(error)
    return found
