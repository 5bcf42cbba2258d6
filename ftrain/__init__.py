"""ftrain: pure training steps, traced into one graph. See README.md for a tour and ARCHITECTURE.md for the house.

What stands here is loaded when it is first asked for.
"""

import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from ftrain import bridge, checkpoint, data, debug, hf, lora, optim, run, tasks, tree
    from ftrain.kernels.mean import Mean, WeightedSum, weighted_sum
    from ftrain.kernels.random import (
        bernoulli,
        bits,
        categorical,
        fold_in,
        key,
        normal,
        permutation,
        randint,
        split,
        truncated_normal,
        uniform,
    )
    from ftrain.kernels.whole_batch import whole_rows, within_documents
    from ftrain.modules.spec import init
    from ftrain.plan.auto import AutoPlan, SavedPlan
    from ftrain.plan.jit import jit
    from ftrain.profile.nodes import profile_nodes
    from ftrain.remat.policy import Remat
    from ftrain.report.out_of_memory import OutOfMemory, explain_oom
    from ftrain.sharding import Layout, Mesh, Plan
    from ftrain.step.api import Step, disable_jit
    from ftrain.step.state import TrainState
    from ftrain.trace.accumulate import accumulate
    from ftrain.trace.grad import forward, grad, value_and_grad
    from ftrain.trace.precision import Precision
    from ftrain.trace.tracer import Aval
    from ftrain.tree import struct

__version__ = "0.2.0"

_PLACES = {
    "ftrain.kernels.mean": ("Mean", "WeightedSum", "weighted_sum"),
    "ftrain.kernels.random": (
        "bernoulli", "bits", "categorical", "fold_in", "key", "normal", "permutation", "randint", "split",
        "truncated_normal", "uniform",
    ),
    "ftrain.kernels.whole_batch": ("whole_rows", "within_documents"),
    "ftrain.modules.spec": ("init",),
    "ftrain.plan.auto": ("AutoPlan", "SavedPlan"),
    "ftrain.plan.jit": ("jit",),
    "ftrain.profile.nodes": ("profile_nodes",),
    "ftrain.remat.policy": ("Remat",),
    "ftrain.report.out_of_memory": ("OutOfMemory", "explain_oom"),
    "ftrain.sharding": ("Layout", "Mesh", "Plan"),
    "ftrain.step.api": ("Step", "disable_jit"),
    "ftrain.step.state": ("TrainState",),
    "ftrain.trace.accumulate": ("accumulate",),
    "ftrain.trace.grad": ("forward", "grad", "value_and_grad"),
    "ftrain.trace.precision": ("Precision",),
    "ftrain.trace.tracer": ("Aval",),
    "ftrain.tree": ("struct",),
}  # fmt: skip
_PLACE_OF = {name: module for module, names in _PLACES.items() for name in names}
_ROOMS = (
    "bridge", "checkpoint", "data", "debug", "hf", "kernels", "lora", "modules", "optim", "run", "sharding", "tasks",
    "tree",
)  # fmt: skip

__all__ = [
    "AutoPlan", "Aval", "Layout", "Mean", "Mesh", "OutOfMemory", "Plan", "Precision", "Remat", "SavedPlan", "Step",
    "TrainState", "WeightedSum", "accumulate", "bernoulli", "bits", "bridge", "categorical", "checkpoint", "data",
    "debug", "disable_jit", "explain_oom", "fold_in", "forward", "grad", "hf", "init", "jit", "key", "lora",
    "normal", "optim", "permutation", "profile_nodes", "randint", "run", "split", "struct", "tasks", "tree",
    "truncated_normal", "uniform", "value_and_grad", "weighted_sum", "whole_rows", "within_documents",
]  # fmt: skip

# Names from elsewhere, and what does that here.
_CALLED_HERE = {
    "Checkpointer": "ftrain.checkpoint.Checkpointer",
    "PRNGKey": "ftrain.key(seed)",
    "count_params": "ftrain.modules.spec.count(specs)",
    "from_pretrained": "ftrain.hf.load_hf",
    "generate": "ftrain.modules.generation.generate_text",
    "load": "ftrain.hf.load_hf",
    "random": "ftrain.key, ftrain.split, ftrain.normal, ...",
    "tree_leaves": "ftrain.tree.leaves",
    "tree_map": "ftrain.tree.map",
}


def __getattr__(name: str) -> _Any:
    if name in _PLACE_OF:
        value = getattr(_importlib.import_module(_PLACE_OF[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return _importlib.import_module(f"ftrain.{name}")
    if name.startswith("__"):
        raise AttributeError(f"module 'ftrain' has no attribute {name!r}")
    if name in _CALLED_HERE:
        raise AttributeError(f"ftrain has no {name!r}: take {_CALLED_HERE[name]}")
    near = _importlib.import_module("ftrain.tree").nearest(name, __all__)
    hint = f"; did you mean {near!r}?" if near else ""
    raise AttributeError(f"module 'ftrain' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS, "__version__"})
