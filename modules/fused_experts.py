"""Experts, each a SwiGLU MLP, whose gate and up projections are one weight (Qwen3-VL-MoE), behind a router of ours.

Shared experts beside them have their weights apart, as in `ftrain.modules.moe`.

Legend: T tokens, N rows sorted by expert, D model width, E experts, F hidden width of an expert.
"""

from typing import Any

from torch import Tensor

from ftrain.kernels.experts import dropped_rows, experts
from ftrain.kernels.grouped_mm import grouped_mm
from ftrain.kernels.swiglu import swiglu
from ftrain.modules import moe
from ftrain.modules.block import Block, Context
from ftrain.modules.moe import MoEConfig
from ftrain.modules.spec import ParamSpec, fan_in


def fused_experts_block(cfg: MoEConfig) -> Block:
    """`router_specs`, `w_gate_up_EDF` (`[E, D, 2 F]`, gates first), `w_down_EFD`, and `shared_specs`.

    >>> fused_experts_block(MoEConfig(8, 4, experts=2, top_k=1)).specs(1.0)["w_gate_up_EDF"].shape
    (2, 8, 8)
    """

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        leaves = (params["w_gate_up_EDF"], params["w_down_EFD"])
        expert_TK, weights_TK, stats = moe.route(
            params["w_router_DE"], x_TD, cfg=cfg, bias_E=at.bias_E(), valid_T=at.valid_T
        )
        at.record(stats._replace(dropped=dropped_rows(expert_TK, leaves[0])))
        out_TD = experts(x_TD, expert_TK, weights_TK, leaves, _network)
        return moe.with_shared(params, x_TD, out_TD, cfg=cfg)

    return Block(lambda out_gain: _specs(cfg, out_gain), apply, routers=(cfg,))


def _network(rows_ND: Tensor, offsets_E: Tensor, expert_N: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
    del expert_N
    gate_NF, up_NF = grouped_mm(rows_ND, leaves[0], offsets_E).chunk(2, -1)
    return grouped_mm(swiglu(gate_NF, up_NF), leaves[1], offsets_E)


def _specs(cfg: MoEConfig, out_gain: float) -> dict[str, Any]:
    d, e, f = cfg.d_model, cfg.experts, cfg.d_expert
    return {
        **moe.router_specs(cfg),
        "w_gate_up_EDF": ParamSpec((e, d, 2 * f), ("expert", "embed", "mlp"), fan_in(d)),
        "w_down_EFD": ParamSpec((e, f, d), ("expert", "mlp", "embed"), fan_in(f, gain=out_gain)),
        **moe.shared_specs(cfg, out_gain=out_gain),
    }
