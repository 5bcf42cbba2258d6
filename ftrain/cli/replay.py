"""`ftrain replay`: run a step of a run again, and find what went wrong in it."""

import math
from dataclasses import dataclass
from pathlib import Path

import tyro

from ftrain.resilience.replay import Replayed, load_run, replay


@dataclass(frozen=True)
class Replay:
    """Run a step of a run again from its nearest checkpoint, and compare the numbers to the bit.

    The exit code is 0 if they are the same, and 1 if they are not.
    """

    run: tyro.conf.Positional[Path]
    """The folder of the run."""
    step: int
    """The step to replay."""
    check: bool = False
    """Run that step node by node and name the first one that made a NaN or an infinity: op, parameter, source line."""
    kept: bool = False
    """For a step that was bad and then ran again without its batch: replay the second run, which was kept."""
    experiment: str | None = None
    """The module that made the run, as my.experiment: its code is run. Default: what the run's config.json names, if
    that is one of experiments.*"""


def run(options: Replay) -> int:
    """The subcommand; returns the exit code. ValueError for a folder or a step that cannot be replayed."""
    made = load_run(options.run, options.experiment)
    same, found, loss = True, None, 0.0
    for event in replay(made, options.run, options.step, check=options.check, kept=options.kept):
        if isinstance(event, Replayed):
            print(event, flush=True)
            same, loss = same and event.equal is not False, event.found["loss"]
        else:
            found = event
    if options.check:
        print(found or _sound(options.step, loss))
    return 0 if same else 1


def _sound(step: int, loss: float) -> str:
    if math.isfinite(loss):
        return f"step {step}: every node's values are finite"
    return f"step {step}: no node computed a NaN or an infinity, so a fill or a where made the loss {loss}"


COMMANDS = {"replay": (Replay, run)}
