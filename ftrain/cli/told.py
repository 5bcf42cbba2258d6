"""What a run notes for who looks at its folder later: what it trains, and where it ended."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.distributed.tensor import DTensor

from ftrain.lora.adapter import Adapter
from ftrain.modules.spec import count, leaves_with_paths
from ftrain.run.folder import RunFolder
from ftrain.run.recipe import Recipe
from ftrain.step.state import TrainState


def trained_by(name: str, recipe: Recipe) -> str:
    """What a recipe of the task `name` trains, in one line."""
    model, adapter = recipe.model, recipe.adapter
    of = f"{name} of {model.name}"
    whole = count(model.specs)
    if adapter is not None:
        kept = f", upon a base in {recipe.quantized}" if recipe.quantized else ""
        return f"{of}: {count(adapter.specs):,} numbers of an adapter of {len(adapter.targets)} parameters{kept}"
    if recipe.trained is None:
        return f"{of}: all {whole:,} numbers"
    own = sum(spec.elements for path, spec in leaves_with_paths(model.specs) if path in recipe.trained)
    return f"{of}: {len(recipe.trained)} parameters, {own:,} numbers of {whole:,}, are trained"


def summed_heads(adapter: Adapter) -> list[str]:
    """A line for each delta of a head: the losses read the head's weight, so the delta is added to it in each step."""
    return [
        f"the delta of {t.path} is added up in each step, {math.prod(t.shape):,} numbers, since the loss reads the "
        "whole head: leave it out of --lora.targets to spare this"
        for t in adapter.targets
        if t.kind == "linear" and "vocab" in t.axes
    ]


def steps_of(state: TrainState) -> int:
    """The steps that a state has made. All ranks call this together."""
    step = state.step
    return int(step.full_tensor() if isinstance(step, DTensor) else step)


@contextmanager
def telling(files: RunFolder | None, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Within the block a run goes on; what is put into the dict is noted at its end, and an error that ends it.

    `files`: of the rank that writes, None elsewhere. A disk that does not take the note ends nothing.
    """
    found = dict(facts)
    _note(files, found)
    try:
        yield found
    except BaseException as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        found.setdefault("ended", f"by {type(error).__name__}: {reason}")
        raise
    finally:
        _note(files, found)


def _note(files: RunFolder | None, facts: Mapping[str, Any]) -> None:
    if files is None:
        return
    try:
        files.summarise(facts)
    except OSError:
        return  # the run's numbers and checkpoints are what counts
