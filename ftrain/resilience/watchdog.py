"""A run in which no step ends any more is stopped, after every rank has written down where it stands.

    with Watchdog(run / "stacks", seconds=600) as watchdog:
        for number, batch in enumerate(batches, start=1):
            state, metrics = step(state, batch)
            watchdog.step_ended(number)

The report of rank r is appended to `rank_<r>.txt`: all threads' Python stacks, the collective that the step's graph
stands at, and torch's flight recorder. The first rank whose time is over tells the others, so that all write theirs,
and each ends its process with EXIT_HUNG.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from datetime import datetime
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from ftrain.graph.host_waits import excused_until
from ftrain.resilience.hang_alarm import Alarm
from ftrain.resilience.signals import EXIT_HUNG
from ftrain.resilience.stacks import thread_stacks
from ftrain.sharding.private import flight_record

_GRACE = 5.0  # for stacks written by C, when no Python runs; twice this for the other ranks' reports


class Watchdog:
    """Ends this process with EXIT_HUNG when no step has ended for `seconds`, on this rank or another.

    While the process waits for a save or a restore it has the time that this may take (see `ftrain.graph.host_waits`),
    and then its own again.

    It works while the main thread waits in C++. If that holds the GIL, no Python runs: then, 5 seconds later, C code
    writes the stacks alone and ends the process with code 1 (`faulthandler`, of which a process has one timer).
    """

    def __init__(self, folder: Path, *, seconds: float, first: float | None = None) -> None:
        """Nothing is watched before `with`.

        Args:
            folder: where the ranks' files are written; shared or not.
            seconds: within which the next step must end.
            first: within which the first step must end, which is traced and compiled; default `seconds`, and at least
                half an hour.

        Raises:
            ValueError: a time is not above 0.

        >>> import pathlib, tempfile
        >>> from ftrain.resilience.watchdog import Watchdog
        >>> with Watchdog(pathlib.Path(tempfile.mkdtemp()) / "stacks", seconds=600) as watchdog:
        ...     for number in (1, 2):
        ...         watchdog.step_ended(number)  # the step before it came to its end
        >>> watchdog.file.exists()  # nobody hung, so there is nothing to read
        False
        """
        if seconds <= 0 or (first is not None and first <= 0):
            raise ValueError(f"a watchdog's time must be positive seconds, not {seconds} (first step: {first})")
        self._seconds, self._first = seconds, max(seconds, 1800.0) if first is None else first
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.file = folder / f"rank_{self.rank}.txt"
        self._limit = self._first
        self._since, self._step = time.monotonic(), 0
        self._armed = 0.0
        self._end = threading.Event()

    def step_ended(self, step: int) -> None:
        """Call after each step, with its number."""
        self._step, self._limit = step, self._seconds
        self.alive()

    def alive(self) -> None:
        """Count the time anew: for work between steps that may take long, as an evaluation does."""
        self._since = time.monotonic()
        self._arm(self._since + self._limit)

    def _arm(self, deadline: float) -> None:
        """Set the timer of last resort, which works while no Python runs."""
        self._armed = deadline
        faulthandler.dump_traceback_later(max(0.0, deadline - time.monotonic()) + _GRACE, exit=True, file=self._out)

    def __enter__(self) -> "Watchdog":
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._out = self.file.open("a", encoding="utf-8")
        self._alarm = Alarm(period=min(1.0, self._seconds / 4))
        self._thread = threading.Thread(target=self._watch, name="ftrain watchdog", daemon=True)
        self.alive()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._alarm.close()
        self._out.close()
        with contextlib.suppress(OSError):  # another run has removed it, or another rank's report is beside it
            if self.file.stat().st_size == 0:
                self.file.unlink()
                self.file.parent.rmdir()

    def _watch(self) -> None:
        while not self._end.is_set():
            deadline, waits_for = self._deadline()
            left = deadline - time.monotonic()
            if left <= 0:
                spent = f"{time.monotonic() - self._since:.0f} s, it waits for {waits_for}"
                said = spent if waits_for else f"{self._limit:g} s"
                self._stop(f"rank {self.rank}: no step ended for {said}, the last was step {self._step}")
            if deadline > self._armed + 1.0:
                self._arm(deadline)
            self._alarm.heard.wait(min(max(left, 0.01), 0.25))
            if self._alarm.heard.is_set():
                self._stop(self._alarm.words)

    def _deadline(self) -> tuple[float, str]:
        """Until when nothing need have happened, and what for: a wait for storage is no hang."""
        excused, waits_for = excused_until(self._limit)
        return max((self._since + self._limit, ""), (excused, waits_for))

    def _stop(self, reason: str) -> None:
        """Write, tell the others, wait for theirs, end the process: nothing else would end a hanging thread."""
        try:
            self._alarm.ring(reason)
            self._report(reason)
            faulthandler.cancel_dump_traceback_later()
            silent = self._alarm.reported(seconds=2 * _GRACE)
            if silent:
                self._out.write(f"\nno report from rank {', '.join(map(str, silent))}\n")
                self._out.flush()
            print(f"{reason}: stopped; where each rank stood is in {self.file.parent}/", file=sys.stderr, flush=True)
        except Exception:  # the report failed: why, and the stacks in the plainest way
            traceback.print_exc()
            faulthandler.dump_traceback(self._out)
        finally:
            os._exit(EXIT_HUNG)

    def _report(self, reason: str) -> None:
        self._out.write(
            f"=== {datetime.now().isoformat(timespec='seconds')}, rank {self.rank}, process {os.getpid()}, "
            f"last step {self._step}\n{reason}\n\n{thread_stacks()}\n"
        )
        self._out.flush()  # the stacks are safe before torch is asked, which may hang too
        self._out.write(f"torch's flight recorder: {flight_record() or 'nothing was recorded'}\n")
        self._out.flush()
        os.fsync(self._out.fileno())
