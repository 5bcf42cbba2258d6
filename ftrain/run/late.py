"""The metrics of a step are judged after the next step was issued, so that the device never waits for the host."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftrain.resilience.anomalies import Verdict
from ftrain.runtime.host_copy import HostCopy


@dataclass(frozen=True)
class Issued:
    """A step that the device was given.

    `batch`: its whole batch; `metrics`: on their way to the host; `began` and `ended`: when it was issued
    (`time.perf_counter`, seconds). Without a device to wait for, the step is done at `ended`.
    """

    number: int
    batch: Any
    metrics: HostCopy
    began: float
    ended: float


@dataclass(frozen=True)
class Done:
    """A step whose metrics are on the host. `seconds`: that it took, without the time it waited for the step before."""

    number: int
    batch: Any
    metrics: Any
    seconds: float


class LateReader:
    """Has every step judged, in order, each after the next one was issued. `judge` decides what follows from its
    metrics.

    A verdict therefore comes one step late: a step that was issued after a bad one is never read, and it leaves no
    trace when the run goes back.
    """

    def __init__(self, judge: Callable[[Done], Verdict]) -> None:
        self._judge, self._read_at = judge, 0.0
        self._last: Issued | None = None
        self.read: int | None = None
        """The number of the last step that was judged."""

    def issued(self, step: Issued) -> Verdict:
        """Note a step that was just issued, and judge the one before it if that was not judged yet."""
        before, self._last = self._last, step
        return Verdict.GO_ON if before is None else self._look(before)

    def flush(self) -> Verdict:
        """Judge the last step now: before a checkpoint, a stop and the end."""
        before, self._last = self._last, None
        return Verdict.GO_ON if before is None else self._look(before)

    def _look(self, step: Issued) -> Verdict:
        metrics = step.metrics.read()
        now = time.perf_counter()
        seconds = now - max(step.began, self._read_at) if step.metrics.queued else step.ended - step.began
        self._read_at, self.read = now, step.number
        return self._judge(Done(step.number, step.batch, metrics, seconds))
