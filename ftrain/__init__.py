"""ftrain: pure training steps, traced into one graph. See README.md for a tour and ARCHITECTURE.md for the house."""

import importlib as _importlib
from pathlib import Path
from typing import Any as _Any

import kernels as _kernels

if Path(_kernels.__file__ or "").resolve().parent.parent != Path(__file__).resolve().parent.parent:
    raise ImportError(
        f"`import kernels` found {_kernels.__file__}, another package of that name (Hugging Face publishes one): put "
        "ftrain's checkout first on sys.path, or `pip uninstall kernels`"
    )

from ftrain import debug, optim, tree
from ftrain.accumulate import accumulate
from ftrain.grad import forward, grad, value_and_grad
from ftrain.jit import jit
from ftrain.out_of_memory import OutOfMemory, explain_oom
from ftrain.precision import Precision
from ftrain.profile import profile_nodes
from ftrain.remat import Remat
from ftrain.search.chosen import AutoPlan, SavedPlan
from ftrain.state import TrainState
from ftrain.step import Step, disable_jit
from ftrain.trace import Aval
from ftrain.tree import struct
from kernels.mean import Mean, WeightedSum, weighted_sum
from kernels.random import (
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
from modules.spec import init
from sharding import Layout, Mesh, Plan

__version__ = "0.1.0"

__all__ = [
    "AutoPlan", "Aval", "Layout", "Mean", "Mesh", "OutOfMemory", "Plan", "Precision", "Remat", "SavedPlan", "Step",
    "TrainState", "WeightedSum", "accumulate", "bernoulli", "bits", "categorical", "debug", "disable_jit",
    "explain_oom", "fold_in", "forward", "grad", "init", "jit", "key", "normal", "optim", "permutation",
    "profile_nodes", "randint", "split", "struct", "tree", "truncated_normal", "uniform", "value_and_grad",
    "weighted_sum",
]  # fmt: skip

_ROOMS = ("checkpoint", "hf")  # found as attributes, and not loaded by those who need no files

# Names from elsewhere, and what does that here.
_CALLED_HERE = {
    "Checkpointer": "ftrain.checkpoint.Checkpointer",
    "PRNGKey": "ftrain.key(seed)",
    "count_params": "modules.spec.count(specs)",
    "from_pretrained": "ftrain.hf.load_hf",
    "generate": "modules.generation.generate_text",
    "load": "ftrain.hf.load_hf",
    "random": "ftrain.key, ftrain.split, ftrain.normal, ...",
    "tree_leaves": "ftrain.tree.leaves",
    "tree_map": "ftrain.tree.map",
}


def __getattr__(name: str) -> _Any:
    if name in _ROOMS:
        return _importlib.import_module(f"ftrain.{name}")
    if name in _CALLED_HERE:
        raise AttributeError(f"ftrain has no {name!r}: take {_CALLED_HERE[name]}")
    near = tree.nearest(name, [*__all__, *_ROOMS])
    hint = f"; did you mean {near!r}?" if near else ""
    raise AttributeError(f"module 'ftrain' has no attribute {name!r}{hint}")
