"""Sharding: the mesh, layouts of components, and what each primitive becomes on many ranks. Knows nothing of models."""

from ftrain.sharding.batch import Offsets, Places, Rows, Same, Tokens
from ftrain.sharding.layout import Capacity, Exact, Hybrid, Layout, Ring, Ulysses
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.plan import Plan

__all__ = [
    "Capacity",
    "Exact",
    "Hybrid",
    "Layout",
    "Mesh",
    "Offsets",
    "Places",
    "Plan",
    "Ring",
    "Rows",
    "Same",
    "Tokens",
    "Ulysses",
]
