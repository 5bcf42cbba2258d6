"""Six ways to divide one state, and a state whose dims divide evenly almost nowhere."""

import torch

from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import place

AXES = {
    "embed_VD": ("vocab", "embed"),
    "experts_EDF": ("expert", "embed", "mlp"),
    "norm_D": ("embed",),
    "bias_1": (None,),
    "wide_DF": (None, "mlp"),
}
LAYOUTS = {
    "one process": Mesh(),
    "fsdp 3": Mesh(1, 3),
    "fsdp 4": Mesh(1, 4),
    "hsdp 2 x 2": Mesh(2, 2),
    "experts 2 x 2": Mesh(1, 2, 2, 2),
    "experts 4, replicas": Mesh(2, 2, 2, 4),
}


def whole_leaves(seed=0):
    numbers = torch.Generator().manual_seed(seed)
    return {
        "embed_VD": torch.randn(37, 6, generator=numbers),
        "experts_EDF": torch.randn(8, 7, 5, generator=numbers).bfloat16(),
        "norm_D": torch.randn(7, generator=numbers),
        "bias_1": torch.randn(1, generator=numbers),
        "wide_DF": torch.randn(3, 13, generator=numbers).double(),
    }


def placements(mesh):
    """Of each leaf: over all axes of the mesh, experts over expert and expert_shard."""
    leaves = whole_leaves()
    return {
        name: place(leaves[name].shape, axes, mesh=mesh, parameters=("shard", "sequence"), experts=True)
        for name, axes in AXES.items()
    }
