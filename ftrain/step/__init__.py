"""Jitted steps: the list of passes, what a compile yields, signatures, calls on one device and on meshes.

Names are loaded when they are first asked for.
"""

import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from ftrain.step.api import Step, disable_jit, make_step
    from ftrain.step.artifact import Compiled
    from ftrain.step.mesh_arguments import MeshArguments
    from ftrain.step.pipeline import Pass, PassRun, Setting, run_passes
    from ftrain.step.plan_source import PlanChoice, PlanRequest, PlanSource
    from ftrain.step.runner import Runner
    from ftrain.step.state import TrainState

_PLACES = {
    "api": ("Step", "disable_jit", "make_step"),
    "artifact": ("Compiled",),
    "mesh_arguments": ("MeshArguments",),
    "pipeline": ("Pass", "PassRun", "Setting", "run_passes"),
    "plan_source": ("PlanChoice", "PlanRequest", "PlanSource"),
    "runner": ("Runner",),
    "state": ("TrainState",),
}
_PLACE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Compiled",
    "MeshArguments",
    "Pass",
    "PassRun",
    "PlanChoice",
    "PlanRequest",
    "PlanSource",
    "Runner",
    "Setting",
    "Step",
    "TrainState",
    "disable_jit",
    "make_step",
    "run_passes",
]


def __getattr__(name: str) -> _Any:
    if name in _PLACE_OF:
        return getattr(_importlib.import_module(f"ftrain.step.{_PLACE_OF[name]}"), name)
    raise AttributeError(f"ftrain.step has no {name!r}; it has {', '.join(__all__)}")
