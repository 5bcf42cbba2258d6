"""Rollback from bad steps: to which checkpoint, without which batches; and the order in which files change."""

from collections.abc import Iterable
from pathlib import Path

from ftrain.checkpoint import delete, steps
from ftrain.resilience.anomalies import BadSteps, History
from ftrain.resilience.skipped import Rollback, Skipped, write_skipped


def plan_rollback(policy: BadSteps, history: History, skipped: Skipped, *, saved: Iterable[int], why: str) -> Rollback:
    """Back to the last of the `saved` steps before the bad ones of the history, or to the start (0).

    A step that the run went back to before, and right after which it was bad again with other batches, holds what is
    bad itself: then to the one before it.

    Args:
        policy: how often a run may go back.
        history: whose `bad` steps are left out; there is at least one.
        skipped: the rollbacks before.
        saved: the steps that have a checkpoint.
        why: the last bad step was bad, in words.

    Raises:
        RuntimeError: the run has gone back as often as the policy allows.

    >>> from ftrain.resilience.anomalies import BadSteps, History
    >>> from ftrain.resilience.rollback import plan_rollback
    >>> from ftrain.resilience.skipped import Skipped
    >>> bad = History(bad=(7, 8, 9))
    >>> plan_rollback(BadSteps(), bad, Skipped(), saved=[3, 6, 9], why="the loss is nan")
    Rollback(positions=(6, 7, 8), bad=(7, 8, 9), back_to=6, why='the loss is nan')
    """
    first, last = history.bad[0], history.bad[-1]
    if len(skipped.rollbacks) >= policy.rollbacks:
        raise RuntimeError(
            f"steps {first} to {last} are bad ({why}), and the run has gone back {policy.rollbacks} times: it will not "
            f"get better by itself. Left out were the batches at positions {list(skipped.positions)}; look at step "
            f"{last} with `ftrain replay RUN --step {last} --check`"
        )
    positions = tuple(skipped.position(step) for step in history.bad)
    tried = {before.back_to for before in skipped.rollbacks if first == before.back_to + 1 and first in before.bad[:1]}
    return Rollback(positions, history.bad, max((s for s in saved if s < first and s not in tried), default=0), why)


def carry_out(rollback: Rollback, skipped: Skipped, *, run: Path, checkpoints: Path) -> Skipped:
    """Remove the checkpoints made after the one that is gone back to, then note what is left out; the new list.

    One process calls this, with no save under way. After a death in between the run goes on from before the bad steps,
    meets them again, and goes back again.

    Raises:
        OSError, ValueError: a checkpoint cannot be deleted, or the list not be written.
    """
    for step in reversed(steps(checkpoints)):
        if step > rollback.back_to:
            delete(checkpoints, step)
    after = skipped.after(rollback)
    write_skipped(run, after)
    return after
