"""Experts that all modalities share, and a router for each modality (Ming-Omni, arXiv 2506.09344).

A token is sent by the router of its modality alone; experts run once for all tokens. Each router has statistics of its
own tokens, so that each keeps its own load even.

Legend: T tokens, D model width, E experts, K experts of a token, M modalities.
"""

from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.experts import dropped_rows, experts_swiglu
from ftrain.modules import moe
from ftrain.modules.block import Block, Context
from ftrain.modules.moe import MoEConfig
from ftrain.modules.spec import ParamSpec, Tree, fan_in


def modality_experts(cfg: MoEConfig, modality_T: Tensor, *, modalities: int) -> Block:
    """The experts of `cfg` with `w_routers_MDE` in the place of `w_router_DE`, as a block for these tokens.

    `modality_T`: int64, below `modalities`, of each token of the pack; made for a pass, as the specs do not read it.
    Statistics are recorded in the order of modalities; what a static capacity drops is counted at the first.

    ValueError for a balance by biases, or a router with a bias, which are not here.

    >>> block = modality_experts(MoEConfig(8, 4, experts=4, top_k=2), torch.zeros(3, dtype=torch.int64), modalities=3)
    >>> block.specs(1.0)["w_routers_MDE"].shape, len(block.routers)
    ((3, 8, 4), 3)
    """
    if cfg.balance == "bias" or cfg.router_bias:
        raise ValueError(
            f"modality_experts: balance={cfg.balance!r}, router_bias={cfg.router_bias}: routers by modality are "
            "balanced by a loss and have no bias; give balance='aux' or 'none' and router_bias=False"
        )

    def specs(out_gain: float) -> Tree:
        tree = moe.specs(cfg, out_gain=out_gain)
        del tree["w_router_DE"]
        shape, axes = (modalities, cfg.d_model, cfg.experts), (None, "embed", None)
        return {**tree, "w_routers_MDE": ParamSpec(shape, axes, fan_in(cfg.d_model))}

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        expert_TK, weights_TK = _routed(params["w_routers_MDE"], x_TD, params["w_gate_EDF"], at)
        own = [params[name] for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")]
        return moe.with_shared(params, x_TD, experts_swiglu(x_TD, expert_TK, weights_TK, *own), cfg=cfg)

    def _routed(w_routers_MDE: Tensor, x_TD: Tensor, w_EDF: Tensor, at: Context) -> tuple[Tensor, Tensor]:
        found = list[tuple[Tensor, Tensor, moe.RouterStats]]()
        for modality, w_DE in enumerate(w_routers_MDE.unbind(0)):
            own_T = modality_T == modality
            valid_T = own_T if at.valid_T is None else own_T & at.valid_T
            found.append(moe.route(w_DE, x_TD, cfg=cfg, valid_T=valid_T))
        expert_TK = _chosen([expert_TK for expert_TK, _, _ in found], modality_T)
        weights_TK = _chosen([weights_TK for _, weights_TK, _ in found], modality_T)
        dropped = dropped_rows(expert_TK, w_EDF)
        for modality, (*_, stats) in enumerate(found):
            at.record(stats if modality else stats._replace(dropped=dropped))
        return expert_TK, weights_TK

    return Block(specs, apply, routers=(cfg,) * modalities)


def _chosen(of: list[Tensor], modality_T: Tensor) -> Tensor:
    """For each token what is of its modality, `[T, K]`."""
    chosen_TK = of[0]
    for modality, own_TK in enumerate(of[1:], 1):
        chosen_TK = torch.where((modality_T == modality)[:, None], own_TK, chosen_TK)
    return chosen_TK
