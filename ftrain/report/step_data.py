"""What reports and explanations read of a step that is ready to run."""

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
    """`graph`: after the passes; `executed`: as it runs on `device` under `backend`. `written`: how many leaves of the
    arguments the new state is written over. `alone`: False on one of several processes. `seconds_to_compile`: of
    tracing and planning. `recompile(remat)`: of the same step with another choice of what to recompute.
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
    """A step that tells of itself; `ftrain.step.artifact.Compiled` is one."""

    @property
    def name(self) -> str:
        """Of its function."""

    def data(self) -> StepData:
        """What reports and explanations read of it."""
