"""Which steps of a run are bad, and when so many follow each other that the run goes back: pure functions of metrics.

    >>> from ftrain.resilience.anomalies import BadSteps, History, judge
    >>> policy, history = BadSteps(limit=2), History()
    >>> for step, loss in ((7, 0.5), (8, float("nan")), (9, float("nan"))):
    ...     history, verdict = judge(policy, history, step=step, loss=loss)
    >>> history.bad, verdict
    ((8, 9), <Verdict.ROLL_BACK: 'roll back'>)

All ranks of a mesh have the same metrics, and so decide alike. A history is a fold over the metrics, so a run that goes
on after a stop makes it again from what it logged.
"""

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

_MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Spikes:
    """A loss is a spike if it lies more than `z` robust deviations above the median of the last `window` good losses.

    The deviation is 1.4826 times the median distance from the median, and at least `least` of the median: losses that
    hardly move are no reason to alarm. Nothing is a spike before `window` good losses.

    Raises:
        ValueError: `window` is below 4, `z` not above 0, or `least` below 0.

    >>> from ftrain.resilience.anomalies import Spikes
    >>> spikes, losses = Spikes(window=4), (2.0, 2.1, 1.9, 2.0)
    >>> spikes.score(2.1, losses) > spikes.z, spikes.score(9.0, losses) > spikes.z
    (False, True)
    """

    window: int = 64
    z: float = 8.0
    least: float = 0.01

    def __post_init__(self) -> None:
        if self.window < 4 or self.z <= 0 or self.least < 0:
            raise ValueError(
                f"spikes need a window of at least 4 losses, a z above 0 and least of at least 0, not {self}"
            )

    def score(self, loss: float, before: tuple[float, ...]) -> float:
        """How many robust deviations `loss` lies above the median of the losses before; 0 while these are too few."""
        if len(before) < self.window:
            return 0.0
        middle = median(before)
        spread = _MAD_TO_SIGMA * median(abs(x - middle) for x in before)
        return (loss - middle) / max(spread, self.least * abs(middle), 1e-30)


@dataclass(frozen=True)
class BadSteps:
    """What is bad, and what follows.

    A step is bad if its loss or gradient norm is not finite, or, with `spikes`, its loss is a spike. After `limit` bad
    steps in a row the run rolls back to the last checkpoint before them and leaves out their batches (0: it never
    does). After `rollbacks` of these it gives up: then the data is not the cause.

    Raises:
        ValueError: `limit` or `rollbacks` is below 0.
    """

    limit: int = 3
    spikes: Spikes | None = None
    rollbacks: int = 10

    def __post_init__(self) -> None:
        if self.limit < 0 or self.rollbacks < 0:
            raise ValueError(f"limit and rollbacks must be at least 0, not {self.limit} and {self.rollbacks}")


class Verdict(enum.Enum):
    """What a run does after a step."""

    GO_ON = "go on"
    ROLL_BACK = "roll back"


@dataclass(frozen=True)
class History:
    """What is kept of the steps so far: the last good `losses`, and `bad`, the steps just passed that were all bad."""

    losses: tuple[float, ...] = ()
    bad: tuple[int, ...] = ()

    @staticmethod
    def of(policy: BadSteps, rows: Iterable[Mapping[str, Any]]) -> "History":
        """The history of a run with these metrics: rows with `step`, `loss` and `grad_norm`, in order."""
        history = History()
        for row in rows:
            history, _ = judge(policy, history, step=row["step"], loss=row["loss"], grad_norm=row["grad_norm"])
        return history


def judge(
    policy: BadSteps, history: History, *, step: int, loss: float, grad_norm: float = 0.0
) -> tuple[History, Verdict]:
    """The history with this step in it, and what the run does. After a rollback the history is made anew, from rows.

    Args:
        policy: what is bad, and how often in a row.
        history: of the steps before this one.
        step: the number of this one, from 1.
        loss, grad_norm: its metrics; NaN and infinities are bad.
    """
    if why_bad(policy, history, loss=loss, grad_norm=grad_norm) is None:
        window = policy.spikes.window if policy.spikes else 0
        return History((*history.losses, loss)[-window:] if window else ()), Verdict.GO_ON
    history = replace(history, bad=(*history.bad, step))
    over = policy.limit > 0 and len(history.bad) >= policy.limit
    return history, Verdict.ROLL_BACK if over else Verdict.GO_ON


def why_bad(policy: BadSteps, history: History, *, loss: float, grad_norm: float = 0.0) -> str | None:
    """Why a step with these metrics is bad, in words; None if it is good."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}"
    if policy.spikes is not None:
        score = policy.spikes.score(loss, history.losses)
        if score > policy.spikes.z:
            return f"the loss {loss:.6g} lies {score:.1f} robust deviations above the last {len(history.losses)}"
    return None
