"""The two-layer MLPs: SwiGLU (Shazeer 2020) and GELU, exact or one of its approximations.

Legend: T tokens, D width, F hidden width.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.swiglu import swiglu
from ftrain.modules.linear import affine
from ftrain.modules.spec import ParamSpec, fan_in, zeros

KINDS = ("swiglu", "gelu", "gelu_tanh", "quick_gelu")
Kind = Literal["swiglu", "gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True)
class MlpConfig:
    """`kind`: swiglu `(silu(x gate) * x up) down`, or `gelu(x up) down` with gelu (exact), gelu_tanh or quick_gelu (`h
    sigmoid(1.702 h)`, CLIP).

    `d_model` is D, `d_hidden` is F; `bias`: of every linear map. ValueError for another kind.
    """

    d_model: int
    d_hidden: int
    kind: Kind = "swiglu"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"MlpConfig.kind={self.kind!r} is not one of {', '.join(KINDS)}")


def specs(cfg: MlpConfig, *, out_gain: float = 1.0) -> dict[str, ParamSpec]:
    """`w_gate_DF` (swiglu only), `w_up_DF`, `w_down_FD`, and with `bias` `b_gate_F`, `b_up_F`, `b_down_D`.

    `out_gain` scales the initial deviation of the last weight, for deep residual stacks.

    >>> {name: spec.shape for name, spec in specs(MlpConfig(8, 16, kind="gelu", bias=True)).items()}
    {'w_up_DF': (8, 16), 'w_down_FD': (16, 8), 'b_up_F': (16,), 'b_down_D': (8,)}
    """
    d, f = cfg.d_model, cfg.d_hidden
    inputs = ("gate", "up") if cfg.kind == "swiglu" else ("up",)
    tree = {f"w_{name}_DF": ParamSpec((d, f), ("embed", "mlp"), fan_in(d)) for name in inputs}
    tree["w_down_FD"] = ParamSpec((f, d), ("mlp", "embed"), fan_in(f, gain=out_gain))
    if cfg.bias:
        tree |= {f"b_{name}_F": ParamSpec((f,), ("mlp",), zeros()) for name in inputs}
        tree["b_down_D"] = ParamSpec((d,), ("embed",), zeros())
    return tree


def apply(params: dict[str, Any], x_TD: Tensor, *, cfg: MlpConfig) -> Tensor:
    """`[T, D]` to `[T, D]`.

    >>> import torch
    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = MlpConfig(8, 16)
    >>> list(apply(spec.init(specs(cfg), random.key(0)), torch.ones(3, 8), cfg=cfg).shape)
    [3, 8]
    """
    up_TF = affine(x_TD, params["w_up_DF"], params.get("b_up_F"))
    if cfg.kind == "swiglu":
        hidden_TF = swiglu(affine(x_TD, params["w_gate_DF"], params.get("b_gate_F")), up_TF)
    elif cfg.kind == "quick_gelu":
        hidden_TF = up_TF * (1.702 * up_TF).sigmoid()
    else:
        hidden_TF = F.gelu(up_TF, approximate="tanh" if cfg.kind == "gelu_tanh" else "none")
    return affine(hidden_TF, params["w_down_FD"], params.get("b_down_D"))
