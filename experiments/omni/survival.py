"""How a run of the experiment looks after itself: its bad steps, its rollbacks, its hangs, its copies."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.omni.batches import Batches
from ftrain.resilience.anomalies import BadSteps, Spikes
from ftrain.resilience.watchdog import Watchdog
from ftrain.run import guard
from ftrain.run.guard import spared_output

__all__ = ["Guard", "SurvivalFlags", "spared_output"]


@dataclass(frozen=True)
class SurvivalFlags:
    """What a run does about bad steps, hangs and silent corruption."""

    bad_steps_limit: int = 3
    """So many steps in a row with a loss or gradient that is not finite (or a spike) undo these steps: the run goes
    back to the last checkpoint before them and leaves out their batches. 0: never."""
    spike: float = 0.0
    """A loss so many robust deviations above the median of the last ones is a bad step. 0: off."""
    spike_window: int = 64
    """How many losses a spike is measured by."""
    hang_seconds: float = 300.0
    """When no step ends for so long, all ranks write their stacks to stacks/ in the run's folder, and the run ends with
    exit code 76. The first step, which is compiled, has half an hour. 0: off."""
    check_replicas: int = 100
    """Every so many steps compare arrays that several processes hold copies of. 0: never."""
    failed_saves: int = 10
    """So many saves in a row may fail, as on a full disk, before the run ends with exit code 74."""

    def __post_init__(self) -> None:
        for name in ("bad_steps_limit", "spike", "hang_seconds", "check_replicas", "failed_saves"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(self, name)}")

    def policy(self) -> BadSteps:
        """What counts as bad."""
        spikes = Spikes(window=self.spike_window, z=self.spike) if self.spike else None
        return BadSteps(limit=self.bad_steps_limit, spikes=spikes)

    def watchdog(self, run: Path) -> AbstractContextManager[Watchdog | None]:
        """Watches the steps of the run in this folder."""
        return Watchdog(run / "stacks", seconds=self.hang_seconds) if self.hang_seconds else nullcontext()


class Guard(guard.Guard):
    """A guard of the main job's steps."""

    def batches(self, source: Batches, done: int, last: int) -> Iterator[dict[str, Any]]:
        """The batches of steps `done + 1` to `last`."""
        for first, end in self.skipped.ranges(done, last):
            yield from source.ahead(first, end)
