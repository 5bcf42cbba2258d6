"""The door of a training run to its checkpoints: saves that go on behind its next steps, and restores."""

import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, TypeVar

from ftrain import tree
from ftrain.checkpoint import ages, read
from ftrain.checkpoint.arrays import DEFAULT_STORAGE, Storage
from ftrain.checkpoint.background import PATIENCE, BackgroundWriter, save_failed
from ftrain.checkpoint.decision import all_done, decide, of_main, refuse, wait_for_decision
from ftrain.checkpoint.errors import SaveFailed
from ftrain.checkpoint.folders import step_number
from ftrain.checkpoint.leaves import Leaves, named_leaves
from ftrain.checkpoint.metrics import checked_metrics
from ftrain.checkpoint.open_store import StoreLike, open_store
from ftrain.checkpoint.placed import parameters_of
from ftrain.checkpoint.ranks import Ranks
from ftrain.checkpoint.retention import KEEP_ALL, Retention
from ftrain.checkpoint.store import Lock
from ftrain.checkpoint.write import require_whole, write_checkpoint
from ftrain.graph.host_waits import expected_wait
from ftrain.sharding.plan import Plan

_log = logging.getLogger("ftrain.checkpoint")
State = TypeVar("State")
_SEEN_AFTER = 90.0
"""Seconds after which every rank sees what rank 0 sees: file systems over a network keep names for up to a minute."""


class Checkpointer:
    """Saves and restores the state of one run in the folder `root`, which holds `global_step_N` (see folders.py).

    >>> import tempfile, torch
    >>> from ftrain.checkpoint import Checkpointer, Retention
    >>> state, folder = {"w": torch.zeros(2), "step": 0}, tempfile.mkdtemp()
    >>> with Checkpointer(folder, keep=Retention(last=2)) as checkpoints:
    ...     if checkpoints.latest() is not None:
    ...         state = checkpoints.restore(state)
    ...     for step in (10, 20, 30):
    ...         state = {"w": state["w"] + 1, "step": step}
    ...         saved = checkpoints.save(state, step, {"loss": 1 / step})
    >>> with Checkpointer(folder) as checkpoints:
    ...     checkpoints.steps(), checkpoints.restore(state)
    ([20, 30], {'w': tensor([3., 3.]), 'step': 30})

    Leaving the `with` block waits for the last save and raises what went wrong in it. One run writes into a folder:
    the first save takes its lock, which is given back by `close`, or when the process ends, however it ends.
    """

    def __init__(
        self,
        root: StoreLike,
        *,
        keep: Retention = KEEP_ALL,
        storage: Storage = DEFAULT_STORAGE,
        background: bool = True,
        busy: Literal["wait", "skip"] = "wait",
        ranks: Ranks | None = None,
        specs: Any = None,
    ) -> None:
        """Nothing is touched on disk before the first save.

        Args:
            root: the folder of checkpoints (made by the first save), or its store (see `open_store`).
            keep: which steps stay, applied after each save.
            storage: how arrays are laid out.
            background: write behind the next steps, at the price of one copy of the state in host memory; False
                writes from the state's own memory before `save` returns.
            busy: when the previous save is still being written, wait for it or skip the new one.
            ranks: the processes that save together, `Ranks.of_run()` for all of torch.distributed; each makes a
                Checkpointer of one folder that all see, and calls `save` for the same steps. Leaves are DTensors, or
                plain tensors that are equal on all ranks. Default: this process alone.
            specs: of the model's parameters, whose logical axes then go into the manifest: `restore(plan=...)` divides
                the state by them.

        Raises:
            ValueError: `root` is no path, URL or store, or `busy` is neither of its values.
        """
        if busy not in ("wait", "skip"):
            raise ValueError(f"busy is 'wait' or 'skip', not {busy!r}")
        self._store = open_store(root)
        self._ranks = ranks or Ranks()
        self._parameters = parameters_of(specs)
        self._keep, self._storage, self._background, self._busy = keep, storage, background, busy
        self._writer = BackgroundWriter(self._store)
        self._lock: Lock | None = None
        self._in_save = 0.0

    def reserve(self, state: Any) -> None:
        """Make the spare memory now, so that the first save blocks no longer than the later ones.

        It is as large as the tensors of `state` that this process holds, on the host; pinned for those on CUDA.

        Raises:
            ValueError: a leaf cannot be saved.
        """
        self._writer.reserve(named_leaves(state))

    def save(self, state: Any, step: int, metrics: Mapping[str, float] | None = None, *, good: bool = True) -> bool:
        """Save `state` as step `step` and return at once, True unless the save was skipped.

        What is saved is the state at the call. A jitted step may take and overwrite it right away: it waits for the
        copy just before its first write. Eager code that touches one of the state's tensors waits for it, too. (Only a
        write through another view, made before, is not held back: then the save fails.)

        A step that exists is replaced. `metrics` are kept in the manifest for `Retention(best=...)`; of several ranks
        those of rank 0. `good`: whether the run is well, as far as it knows; of copies that are not good none takes
        the place of a good one (see `Retention`).

        Raises:
            SaveFailed: the previous background save failed; this one was not begun. (Call again to go on.)
            ValueError: a leaf, its name or a metric cannot be saved, `step` is no whole number, or another run writes
                into the folder.
            RuntimeError: rank 0 no longer answers.
            TimeoutError: it lives and does not save.
        """
        began = time.perf_counter()
        try:
            return self._save(state, step, metrics, good)
        finally:
            self._in_save = time.perf_counter() - began

    @property
    def blocked(self) -> float:
        """Seconds that the training loop has stood still for the last save so far: in `save`, and where a step or other
        code then waited for the copy of its state.
        """
        return self._in_save + self._writer.waited

    def wait(self) -> None:
        """Return when the last save is on the disk. Raises `SaveFailed` if it is not going to be."""
        self._writer.wait()

    def check(self) -> None:
        """Raise `SaveFailed` if the last save has already failed; never waits. Cheap enough for every step."""
        if not self._writer.is_running:
            self.wait()

    def latest(self) -> int | None:
        """The last committed step, or None. A save that is still being written is not counted.

        Of several ranks all call this together, and have the answer of rank 0: on a shared file system each might see
        another.

        Raises:
            OSError, ValueError: of the file system or object store; on other ranks RuntimeError or ValueError.
        """
        return of_main(self._ranks, lambda: ages.latest(self._store), "asked for the latest checkpoint")

    def steps(self) -> list[int]:
        """All committed steps, ascending; as `latest`, those that rank 0 sees, and with its errors."""
        return of_main(self._ranks, self._store.steps, "asked for the saved steps")

    def restore(
        self,
        abstract_state: State,
        step: int | None = None,
        *,
        plan: Plan | None = None,
        partial: bool = False,
        donate: bool = False,
    ) -> State:
        """As `ftrain.checkpoint.restore`, from this folder, after waiting for a save in flight.

        Of several ranks all call this together: rank 0 says which step, and all restore the same version of it.

        Raises:
            SaveFailed: the save in flight has failed; nothing is restored. (Call again to do so.)
            DamagedCheckpoint, ValueError, OSError: as `ftrain.checkpoint.restore`.
            RuntimeError: another rank could not restore; it is named.
            TimeoutError: this rank does not see the step that rank 0 restores.
        """
        self.wait()
        with expected_wait("a restore", seconds=PATIENCE):
            if self._ranks.world == 1:
                return read.restore(abstract_state, self._store, step, plan=plan, partial=partial, donate=donate)
            step, version = of_main(self._ranks, lambda: read.version_of(self._store, step), "restored a checkpoint")
            error: BaseException | None = None
            try:
                read.await_version(self._store, step, version, seconds=_SEEN_AFTER)
                return read.restore_version(
                    abstract_state, self._store, step, version=version, plan=plan, partial=partial, donate=donate
                )
            except BaseException as cause:
                error = cause
                raise
            finally:
                all_done(self._ranks, error)

    def close(self) -> None:
        """Wait for the last save, give back the spare memory, and let other runs write into the folder.

        Raises:
            SaveFailed: the last save has failed. The folder is given back even so.
        """
        try:
            self.wait()
        finally:
            self._writer.give_memory_back()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except SaveFailed:
            if error is None:  # which ends the block already, and must not be hidden; this one is in the log
                raise

    def _save(self, state: Any, step: int, given: Mapping[str, float] | None, good: bool) -> bool:
        round_number = self._ranks.next_round(f"saved step {step}")
        self._writer.forget_waits()
        try:
            step, metrics = step_number(step), checked_metrics(given)
            leaves = named_leaves(state)
            require_whole(leaves, self._ranks)
        except ValueError as error:
            refuse(self._ranks, round_number, error)
            raise
        if not _agreed(self._ranks, round_number, lambda: self._begin(step), self._writer.forget_failure):
            _log.warning("step %d is not saved: the previous save is still being written", step)
            return False

        def write(taken: Callable[[], Leaves]) -> None:
            write_checkpoint(
                self._store,
                step,
                taken,
                storage=self._storage,
                metrics=metrics,
                parameters=self._parameters,
                keep=self._keep,
                good=good,
                ranks=self._ranks,
                round_number=round_number,
            )

        if self._background:
            self._writer.start(step, leaves, dict(zip(tree.paths(state), tree.leaves(state), strict=True)), write)
        else:
            self._writer.run(step, leaves, write)
            self.wait()
        return True

    def _begin(self, step: int) -> bool:
        """Of rank 0: False to skip the save."""
        if self._busy == "skip" and self._writer.is_running:
            return False
        self.wait()
        if self._lock is not None and not self._lock.is_held():
            self._lock.release()
            self._lock = None
        if self._lock is None:
            try:
                self._lock = self._store.lock()
            except OSError as cause:
                raise save_failed(self._store, step, cause) from cause
        return True


def _agreed(ranks: Ranks, round_number: int, begin: Callable[[], bool], forget_failure: Callable[[], None]) -> bool:
    """Rank 0 decides for all: a save is begun, skipped or refused on every rank alike. False: skipped.

    `forget_failure`: of what rank 0 has raised already, or is raised now with its words.
    """
    if ranks.rank == 0:
        return decide(ranks, round_number, begin)
    with expected_wait("rank 0, which begins a save", seconds=PATIENCE):
        begun = wait_for_decision(ranks, round_number, forget_failure)
    if begun:
        forget_failure()
    return begun
