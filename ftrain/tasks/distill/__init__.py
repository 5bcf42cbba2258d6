"""Distillation of velocity fields into students of few steps, without guidance: pure losses, and steps over a tree of
roles.

Every loss takes velocity fields (`ftrain.modules.velocity`): whose parameters they have, one tree's or a view of a base
and deltas, is the step's business (`roles.py`). What a teacher, a critic or an average says gets no gradient.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.tasks.distill.consistency import Consistency, ContinuousConsistency
    from ftrain.tasks.distill.dmd import Dmd
    from ftrain.tasks.distill.guidance import Baked, Fused
    from ftrain.tasks.distill.progressive import Progressive
    from ftrain.tasks.distill.roles import Role
    from ftrain.tasks.distill.trajectory import Trajectory

__all__ = [
    "Baked", "Consistency", "ContinuousConsistency", "Dmd", "Fused", "Progressive", "Role", "Trajectory",
]  # fmt: skip
__getattr__ = lazy_names(
    "ftrain.tasks.distill",
    {
        "consistency": ("Consistency", "ContinuousConsistency"),
        "dmd": ("Dmd",),
        "guidance": ("Baked", "Fused"),
        "progressive": ("Progressive",),
        "roles": ("Role",),
        "trajectory": ("Trajectory",),
    },
)
