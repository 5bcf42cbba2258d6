"""Which layout to train with: the search, plan files, and `ftrain.jit`, which takes either.

Names are loaded when they are first asked for. A function that has the name of its module is imported from there.
"""

import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from ftrain.plan.auto import AutoPlan, SavedPlan, search_local_machine
    from ftrain.plan.cost import Price, price
    from ftrain.plan.file import PlanFile, load_plan
    from ftrain.plan.local_machine import local_cluster
    from ftrain.plan.search import Options, Result
    from ftrain.plan.space import Candidate, ModelShape, Space
    from ftrain.plan.workload import Workload, WorkloadStep

_PLACES = {
    "auto": (
        "AutoPlan",
        "SavedPlan",
        "search_local_machine",
    ),
    "cost": (
        "Price",
        "price",
    ),
    "file": (
        "PlanFile",
        "load_plan",
    ),
    "local_machine": ("local_cluster",),
    "search": (
        "Options",
        "Result",
    ),
    "space": (
        "Candidate",
        "ModelShape",
        "Space",
    ),
    "workload": (
        "Workload",
        "WorkloadStep",
    ),
}
_PLACE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "AutoPlan",
    "Candidate",
    "ModelShape",
    "Options",
    "PlanFile",
    "Price",
    "Result",
    "SavedPlan",
    "Space",
    "Workload",
    "WorkloadStep",
    "load_plan",
    "local_cluster",
    "price",
    "search_local_machine",
]


def __getattr__(name: str) -> _Any:
    if name in _PLACE_OF:
        return getattr(_importlib.import_module(f"ftrain.plan.{_PLACE_OF[name]}"), name)
    raise AttributeError(f"ftrain.plan has no {name!r}; it has {', '.join(__all__)}")
