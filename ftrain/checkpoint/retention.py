"""Which checkpoints to keep. Pure: from what is known of the steps to those to delete."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ftrain.checkpoint.ages import Kept


@dataclasses.dataclass(frozen=True)
class Retention:
    """Keep the `last` n good copies (None: all), every step that is a multiple of `every`, and the `best` m by
    `metric`.

    `lower_is_better` says which metrics are good. A step without that metric, or with NaN, is never among the best.
    Copies that were saved while the run was not well (`Checkpointer.save(good=False)`) do not count: the newest stays
    beside the good ones until a newer one is there.

    Raises:
        ValueError: a number would keep nothing or is no whole number, or one of `best` and `metric` lacks the other.

    >>> from ftrain.checkpoint import Retention, to_delete
    >>> from ftrain.checkpoint.ages import Kept
    >>> saved = [Kept(step, order=step, metrics={"loss": 1 / step}) for step in (100, 150, 200, 250)]
    >>> to_delete(saved, Retention(last=1))
    [100, 150, 200]
    >>> to_delete(saved, Retention(last=1, every=100))
    [150]
    >>> to_delete(saved, Retention(last=1, best=2, metric="loss"))
    [100, 150]
    """

    last: int | None = None
    every: int | None = None
    best: int = 0
    metric: str | None = None
    lower_is_better: bool = True

    def __post_init__(self) -> None:
        if self.last is not None and (type(self.last) is not int or self.last < 1):
            raise ValueError(
                f"Retention(last={self.last}) would keep nothing or is no whole number: use 1 or more, or None for all"
            )
        if self.every is not None and (type(self.every) is not int or self.every < 1):
            raise ValueError(f"Retention(every={self.every}) must be a whole number of at least 1, or None")
        if self.best < 0 or (self.best > 0) != (self.metric is not None):
            raise ValueError(
                f"Retention(best={self.best}, metric={self.metric!r}): give both, as best=3, metric='loss'"
            )


KEEP_ALL = Retention()


def to_delete(steps: Sequence[Kept], keep: Retention, *, protected: int | None = None) -> list[int]:
    """The steps, ascending, that `keep` does not ask for. Nothing is touched.

    Args:
        steps: what is known of the steps, from the oldest to the newest (see `ftrain.checkpoint.ages.kept`).
        keep: the rule.
        protected: a step that is kept whatever the rule says, as the newest is.
    """
    if keep.last is None:
        return []
    good = [found.step for found in steps if found.good]
    kept = {*good[-keep.last :], *(found.step for found in steps[-1:]), protected}
    kept |= set(best_steps({found.step: found.metrics for found in steps}, keep))
    if keep.every is not None:
        kept |= {step for step in good if step % keep.every == 0}
    return sorted({found.step for found in steps} - kept)


def best_steps(steps: Mapping[int, Mapping[str, float]], keep: Retention) -> list[int]:
    """The `keep.best` best steps, best first; of equal ones the later."""
    if keep.metric is None:
        return []
    sign = 1.0 if keep.lower_is_better else -1.0
    measured = {step: sign * metrics[keep.metric] for step, metrics in steps.items() if keep.metric in metrics}
    ranked = sorted((value, -step) for step, value in measured.items() if not math.isnan(value))
    return [-step for _, step in ranked[: keep.best]]
