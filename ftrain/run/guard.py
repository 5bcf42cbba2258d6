"""Judges the steps of a run and plans its rollbacks: what is noted of bad steps, and where the run goes on."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftrain.checkpoint import Checkpointer
from ftrain.files.outside import check, number, record, whole
from ftrain.resilience.anomalies import BadSteps, History, Verdict, judge, why_bad
from ftrain.resilience.failure_dump import FailureDump, write_failure_dump
from ftrain.resilience.rollback import carry_out, plan_rollback
from ftrain.resilience.skipped import read_skipped
from ftrain.run.folder import read_metrics
from ftrain.run.ranks import is_main, of_main

_JUDGED = record(
    {"step": whole(1), "loss": number(finite=False), "grad_norm": number(finite=False)},
    others=True,
)
_log = logging.getLogger("ftrain.run")


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
        rows = [row for row in read_metrics(self._run) if row["step"] <= done and "loss" in row]
        self.history = of_main(History.of(self._policy, [check(row, _JUDGED, str(self._run)) for row in rows]))
        self.finite = of_main(not rows or _is_finite(rows[-1]))

    @property
    def calm(self) -> bool:
        """Whether the last step was good: during bad steps nothing is saved."""
        return not self.history.bad

    def counts(self) -> dict[str, int]:
        """For the metrics: bad steps in a row up to now, and batches left out in all."""
        return {"bad_in_a_row": len(self.history.bad), "left_out": len(self.skipped.positions)}

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
