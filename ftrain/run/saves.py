"""Saves of a run that survive a disk which is full or fails for a while: failures are reported, and saves are
retried.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ftrain.checkpoint import Checkpointer, SaveFailed
from ftrain.resilience.signals import EXIT_NOT_SAVED
from ftrain.run.folder import RunFolder
from ftrain.run.ranks import any_rank

_LOOKED_AT_EVERY = 10
_PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0)


class NotSaved(SystemExit):
    """The run gives up, since too many saves in a row have failed. Ends the process with `EXIT_NOT_SAVED`."""

    def __init__(self) -> None:
        super().__init__(EXIT_NOT_SAVED)


class Saves:
    """The saves of a run. All ranks have one and call it for the same steps, and all agree whether a save has failed.

    `held`: whether the last save of `save_now` is stored.
    """

    def __init__(
        self, checkpoints: Checkpointer, files: RunFolder | None, *, say: Callable[[str], None], most_failed: int
    ) -> None:
        """- `files`: of the rank that has them; its metrics are flushed before a checkpoint of a later step.
        - `say`: called with a line for each failure.
        - `most_failed`: saves in a row that may fail before the run ends.
        """
        self._checkpoints, self._files, self._say, self._most = checkpoints, files, say, most_failed
        self._failed, self._again, self._pending = 0, 0, False
        self.held = True

    def wanted(self, step: int) -> bool:
        """Whether to save after this step because an earlier save has failed; the same on all ranks."""
        if step % _LOOKED_AT_EVERY == 0 and any_rank(self._has_failed()):
            self._failed, self._pending = self._failed + 1, False
            self._again = self._again or step
        return 0 < self._again <= step

    def save(self, state: Any, step: int, *, good: bool = True, metrics: Mapping[str, float] | None = None) -> None:
        """Save `state` as that after `step`, while the next steps run; `good`, `metrics`: as in `Checkpointer.save`. A
        save that has failed is retried after a later step, each time after twice as many.

        Raises NotSaved if too many saves in a row have failed, and ValueError as `Checkpointer.save` does.
        """
        self._again = 0
        # The first call may raise the failure of the save before.
        attempt = partial(self._attempt, state, step, good=good, metrics=metrics)
        begun = attempt() or attempt()
        if self._failed > self._most:
            self._say(f"{self._failed} saves in a row have failed: the run ends")
            raise NotSaved
        if not begun:
            self._again = step + 2 ** min(self._failed, 8)

    def save_now(self, state: Any, step: int, *, good: bool = True, metrics: Mapping[str, float] | None = None) -> None:
        """Save as `save` does and wait for it, as after the last step; retried for some seconds. Afterwards `held` says
        whether it is stored. ValueError as for `save`.
        """
        self._again, self.held = 0, False
        for pause in _PAUSES:
            time.sleep(pause)
            self.held = not any_rank(not self._attempt(state, step, good=good, metrics=metrics, wait=True))
            if self.held:
                return

    def _attempt(
        self, state: Any, step: int, *, good: bool, metrics: Mapping[str, float] | None, wait: bool = False
    ) -> bool:
        if self._files is not None:
            self._files.sync()
        try:
            self._checkpoints.save(state, step, metrics, good=good)
            if wait:
                self._checkpoints.wait()
        except SaveFailed as error:
            self._failed, self._pending = self._failed + 1, False
            self._say(f"{error}; the run goes on")
            return False
        if wait or self._pending:  # a save begins when the one before is stored
            self._failed = 0
        self._pending = not wait
        return True

    def _has_failed(self) -> bool:
        try:
            self._checkpoints.check()
        except SaveFailed as error:
            self._say(f"{error}; the run goes on")
            return True
        return False
