"""Sharding: the mesh, layouts of components, and what each primitive becomes on many ranks. Knows nothing of models."""

from ftrain.sharding.batch import BatchRows, Offsets, Replicated, TokenIndices, Tokens
from ftrain.sharding.layout import CapacityFactor, Dropless, Hybrid, Layout, Ring, Ulysses
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.plan import Plan

__all__ = [
    "BatchRows",
    "CapacityFactor",
    "Dropless",
    "Hybrid",
    "Layout",
    "Mesh",
    "Offsets",
    "Plan",
    "Replicated",
    "Ring",
    "TokenIndices",
    "Tokens",
    "Ulysses",
]
