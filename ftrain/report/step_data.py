"""What reports and explanations read of a compiled step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from ftrain.analysis.liveness import MemoryPlan
from ftrain.remat.policy import Remat
from ftrain.trace.tracer import Traced


@dataclass(frozen=True)
class StepData:
    """A compiled step, for reports.

    - `graph`: after the passes; `executed`: as it runs on `device` under `backend`.
    - `memory`: the memory plan. `written`: how many argument leaves the new state is written over.
    - `alone`: False on one of several processes.
    - `seconds_to_compile`: of tracing and planning.
    - `recompile(remat)`: the data of the same step with another choice of what to recompute.
    """

    name: str
    traced: Traced
    graph: fx.GraphModule
    executed: fx.GraphModule
    memory: MemoryPlan
    written: int
    backend: str
    device: torch.device
    alone: bool
    seconds_to_compile: float
    recompile: Callable[[Remat], "StepData"]


class Described(Protocol):
    """A step that describes itself, such as `ftrain.step.artifact.Compiled`."""

    @property
    def name(self) -> str:
        """The name of its function."""

    def data(self) -> StepData:
        """What reports and explanations read of it."""
