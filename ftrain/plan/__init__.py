"""Which layout to train with: the search, plan files, and `ftrain.jit`, which takes either.

Names are loaded when they are first asked for. A function that has the name of its module is imported from there.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names as _lazy_names

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

__getattr__ = _lazy_names(__name__, _PLACES)
