"""Sharding: the mesh, layouts of components, and what each primitive becomes on many ranks. Knows nothing of models."""

from ftrain.sharding.batch import BatchRows, BatchRule, Offsets, Replicated, TokenIndices, TokenOrder, Tokens
from ftrain.sharding.layout import CapacityFactor, Dropless, Hybrid, Layout, Ring, Ulysses
from ftrain.sharding.link import Link
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.paths import Rules, match
from ftrain.sharding.placement import Placement
from ftrain.sharding.plan import Plan

__all__ = [
    "BatchRows",
    "BatchRule",
    "CapacityFactor",
    "Dropless",
    "Hybrid",
    "Layout",
    "Link",
    "Mesh",
    "Offsets",
    "Placement",
    "Plan",
    "Replicated",
    "Ring",
    "Rules",
    "TokenIndices",
    "TokenOrder",
    "Tokens",
    "Ulysses",
    "match",
]
