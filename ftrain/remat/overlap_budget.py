"""The memory that recompute and overlap share: what a step may take of its device beyond its arguments."""

from dataclasses import replace

import torch
from torch import fx

from ftrain.analysis.liveness import input_bytes
from ftrain.remat.planner import budget_bytes
from ftrain.remat.policy import Remat
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.processes import same_everywhere


def bytes_within(module: fx.GraphModule, remat: Remat, device: torch.device, mesh: Mesh | None) -> int | None:
    """The budget of recompute less the arguments; without one, what is free on a card. The same number on all ranks.

    None on a CPU without a budget, whose memory all ranks share with others.
    """
    if remat.budget is None and device.type != "cuda":
        return None
    inputs = input_bytes(module)
    wanted = remat if remat.budget is not None else replace(remat, budget="fit")
    return same_everywhere(budget_bytes(wanted, device, inputs), mesh) - inputs
