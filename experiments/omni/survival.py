"""How a run of the experiment looks after itself: its bad steps, its rollbacks, its hangs, its copies."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.omni.batches import Batches
from ftrain.checkpoint import Checkpointer
from ftrain.files.outside import check, number, record, whole
from ftrain.resilience.anomalies import BadSteps, History, Spikes, Verdict, judge, why_bad
from ftrain.resilience.failure_dump import FailureDump, write_failure_dump
from ftrain.resilience.rollback import carry_out, plan_rollback
from ftrain.resilience.skipped import read_skipped
from ftrain.resilience.watchdog import Watchdog
from ftrain.run.folder import read_metrics
from ftrain.run.ranks import is_main, of_main

_JUDGED = record(
    {"step": whole(1), "loss": number(finite=False), "grad_norm": number(finite=False)},
    others=True,
)
_log = logging.getLogger("experiments.omni")


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


class Guard:
    """Judges every step of the run in the folder `run`, and plans rollbacks. All ranks have one, and decide alike.

    `history`: of the steps just passed; `skipped`: the batches that are left out; `finite`: whether the last step's
    loss and gradient were.
    """

    def __init__(self, policy: BadSteps, run: Path, *, done: int, last: int | None = None) -> None:
        """For a run that has done so many steps, and ends after step `last`."""
        self._policy, self._run, self._last, self._why = policy, run, last, ""
        self.skipped = of_main(read_skipped(run))
        self._begin_after(done)

    def _begin_after(self, done: int) -> None:
        rows = [row for row in read_metrics(self._run) if row["step"] <= done]
        self.history = of_main(History.of(self._policy, [check(row, _JUDGED, str(self._run)) for row in rows]))
        self.finite = of_main(not rows or _is_finite(rows[-1]))

    @property
    def calm(self) -> bool:
        """Whether the last step was good: during bad steps nothing is saved."""
        return not self.history.bad

    def counts(self) -> dict[str, int]:
        """For the metrics: bad steps in a row up to now, and batches left out in all."""
        return {"bad_in_a_row": len(self.history.bad), "left_out": len(self.skipped.positions)}

    def batches(self, source: Batches, done: int, last: int) -> Iterator[dict[str, Any]]:
        """The batches of steps `done + 1` to `last`."""
        for first, end in self.skipped.ranges(done, last):
            yield from source.ahead(first, end)

    def look(self, row: Mapping[str, Any], batch: Any) -> Verdict:
        """Judge the step with these metrics; if it is bad, its whole batch is left for a replay.

        A run does not end on a step that is not finite: then it goes back, however few the bad steps are.
        """
        step, numbers = row["step"], {"loss": row["loss"], "grad_norm": row["grad_norm"]}
        why = why_bad(self._policy, self.history, **numbers)
        self.history, verdict = judge(self._policy, self.history, step=step, **numbers)
        if why is not None:
            self._why = why
            if is_main():
                dump = FailureDump(step, self.skipped.position(step), row["loss"], why, self.skipped)
                with spared_output("the batch of a bad step"):
                    write_failure_dump(self._run, dump, batch)
        self.finite = _is_finite(row)
        if step == self._last and not self.finite and self._policy.limit > 0:
            return Verdict.ROLL_BACK
        return verdict

    def go_back(self, checkpoints: Checkpointer) -> tuple[int, str]:
        """Undo the bad steps on the disk: the step to go on from (0: the start), and what happened in words."""
        checkpoints.wait()
        saved = of_main(checkpoints.steps())
        rollback = plan_rollback(self._policy, self.history, self.skipped, saved=saved, why=self._why)
        folder = self._run / "checkpoints"
        if is_main():
            self.skipped = carry_out(rollback, self.skipped, run=self._run, checkpoints=folder)
        self.skipped = of_main(self.skipped)
        self._begin_after(rollback.back_to)
        return rollback.back_to, (
            f"steps {rollback.bad[0]} to {rollback.bad[-1]} were bad ({rollback.why}): back to step "
            f"{rollback.back_to}, without the batches at positions {', '.join(map(str, rollback.positions))}"
        )


@contextmanager
def spared_output(what: str) -> Iterator[None]:
    """Within the block a disk that refuses a file does not end the run: it is said, and the file is not there."""
    try:
        yield
    except OSError as error:
        _log.warning("%s could not be written: %s", what, error)


def _is_finite(row: Mapping[str, Any]) -> bool:
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
