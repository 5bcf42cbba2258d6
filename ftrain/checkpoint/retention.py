"""Which checkpoints to keep. Pure: from steps and metrics to the steps to delete."""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Retention:
    """Keep the `last` n steps (None: all), and every step that is a multiple of `every`, and the `best` m by `metric`.

    `lower_is_better` says which metrics are good. A step without that metric, or with NaN, is never among the best.
    """

    last: int | None = None
    every: int | None = None
    best: int = 0
    metric: str | None = None
    lower_is_better: bool = True

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ValueError(f"Retention(last={self.last}) would keep nothing: use 1 or more, or None for all")
        if self.every is not None and self.every < 1:
            raise ValueError(f"Retention(every={self.every}) must be 1 or more, or None")
        if self.best < 0 or (self.best > 0) != (self.metric is not None):
            raise ValueError(
                f"Retention(best={self.best}, metric={self.metric!r}): give both, as best=3, metric='loss'"
            )


KEEP_ALL = Retention()


def to_delete(steps: Mapping[int, Mapping[str, float]], keep: Retention, *, protected: int | None = None) -> list[int]:
    """The steps, ascending, that `keep` does not ask for. `steps` maps each to its metrics; `protected` is kept."""
    if keep.last is None:
        return []
    kept = set(sorted(steps)[-keep.last :]) | set(best_steps(steps, keep)) | {protected}
    if keep.every is not None:
        kept |= {step for step in steps if step % keep.every == 0}
    return sorted(set(steps) - kept)


def best_steps(steps: Mapping[int, Mapping[str, float]], keep: Retention) -> list[int]:
    """The `keep.best` best steps, best first; of equal ones the later."""
    if keep.metric is None:
        return []
    sign = 1.0 if keep.lower_is_better else -1.0
    measured = {step: sign * metrics[keep.metric] for step, metrics in steps.items() if keep.metric in metrics}
    ranked = sorted((value, -step) for step, value in measured.items() if not math.isnan(value))
    return [-step for _, step in ranked[: keep.best]]
