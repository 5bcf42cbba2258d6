"""How long a run is: one that goes on may be made longer, and never shorter.

The order of its data does not depend on the length (`choice`). A learning rate that does goes by the new length from
the step on at which the run was made longer; `config.json` keeps the earlier lengths, so that any step can be replayed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.omni.training import TrainConfig, schedule
from ftrain.files.outside import check, listed, whole

DEFAULT = 1100


class Length(NamedTuple):
    """`steps` in all; `earlier`: up to which step the run had how many. `longer`: whether it is longer than before."""

    steps: int
    earlier: tuple[tuple[int, int], ...] = ()
    longer: bool = False


def earlier_of(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The earlier lengths of the run with this config."""
    found = check(config.get("earlier", []), listed(listed(whole())), "config.json: earlier")
    return tuple((until, steps) for until, steps in found)


def continued(config: Mapping[str, Any], steps: int | None, *, done: int, run: Path) -> Length:
    """The length of the run with this config that has done so many steps and goes on, to `steps` in all (None: as many
    as it has).

    ValueError if that is less than it has.
    """
    had, earlier = check(config.get("steps"), whole(1), f"{run}: steps"), earlier_of(config)
    if steps is None or steps == had:
        return Length(had, earlier)
    if steps < had:
        raise ValueError(
            f"the run in {run} has --steps {had}, not {steps}: a run that goes on may be made longer, never shorter; "
            f"give --steps {had} or more, or another --out"
        )
    kept = tuple(length for length in earlier if length[0] < done)
    return Length(steps, (*kept, (done, had)) if done else (), longer=True)


def made_longer(length: Length, config: TrainConfig) -> str:
    """What is said of a run that was made longer."""
    done, had = length.earlier[-1] if length.earlier else (0, 0)
    if not had:
        return f"the run is made longer, to {length.steps} steps, before its first one is saved"
    if config.decay == "constant":
        rate = "the learning rate does not depend on the length"
    else:
        before, after = (
            float(schedule(cfg)(torch.tensor(done)))
            for cfg in (TrainConfig(steps=had, earlier=length.earlier[:-1]), config)
        )
        rate = f"the learning rate is that of {length.steps} steps from here on: {after:.3g}, where it was {before:.3g}"
    return f"the run is made longer after step {done}, from {had} to {length.steps} steps: its data go on, and {rate}"
