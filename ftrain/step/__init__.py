"""Jitted steps: the list of passes, what a compile yields, signatures, calls on one device and on meshes.

Names are loaded when they are first asked for.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names as _lazy_names

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

__getattr__ = _lazy_names(__name__, _PLACES)
