"""ftrain: pure training steps, traced into one graph. See README.md for a tour and ARCHITECTURE.md for the house."""

from pathlib import Path

import kernels as _kernels

if Path(_kernels.__file__ or "").resolve().parent.parent != Path(__file__).resolve().parent.parent:
    raise ImportError(
        f"`import kernels` found {_kernels.__file__}, another package of that name (Hugging Face publishes one): put "
        "ftrain's checkout first on sys.path, or `pip uninstall kernels`"
    )

from ftrain import debug, optim, tree
from ftrain.accumulate import accumulate
from ftrain.grad import forward, grad, value_and_grad
from ftrain.jit import Step, disable_jit, jit
from ftrain.out_of_memory import OutOfMemory, explain_oom
from ftrain.precision import Precision
from ftrain.profile import profile_nodes
from ftrain.remat import Remat
from ftrain.search.chosen import AutoPlan, SavedPlan
from ftrain.state import TrainState
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

__all__ = [
    "AutoPlan", "Aval", "Mean", "OutOfMemory", "Precision", "Remat", "SavedPlan", "Step", "TrainState", "WeightedSum",
    "accumulate", "bernoulli", "bits", "categorical", "debug", "disable_jit", "explain_oom", "fold_in", "forward",
    "grad", "init", "jit", "key", "normal", "optim", "permutation", "profile_nodes", "randint", "split", "struct",
    "tree", "truncated_normal", "uniform", "value_and_grad", "weighted_sum",
]  # fmt: skip
