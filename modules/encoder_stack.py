"""The transformer that encoders of pictures, sound and text share: pre-norm layers within an item of the pack.

Each layer is a `Block` (modules/block.py), the built-in one or another that the configuration gives, as in a decoder.

Legend: T rows (patches or frames), D width, A position axes, L layers.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ftrain.kernels.documents import Segments
from ftrain.modules import norm
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Context, WholeItems, in_turn, require_no_routers
from ftrain.modules.layers import attention_block, mlp_block, residual_layer
from ftrain.modules.mlp import Kind as MlpKind
from ftrain.modules.mlp import MlpConfig


@dataclass(frozen=True)
class StackConfig:
    """`layers` layers `d_model` wide, `heads` heads, an MLP of `d_hidden`.

    `position_axes` is how many coordinates a row has (1 time, 2 row and column, 3 time, row and column); each has an
    equal share of the head dim, and its own whole range of rotary frequencies up to base `rope_base`. Without one
    (None) nothing turns: places are in the rows, and positions are not read. `mlp_kind`: of the MLPs; `eps`: of the
    norms; `causal`: a row sees none behind it.

    `pattern`: layers of your own, in turn: layer i is `pattern[i % len(pattern)]`, where None is the layer that the
    other fields describe. `layer_with` makes one of those with another MLP or attention in it.

    Raises:
        ValueError: a size is below 1, `d_model` over `heads` is no whole number, or with rotation no even one, or one
            with fewer pairs than there are position axes, or a block of `pattern` has routers.
    """

    d_model: int
    layers: int
    heads: int
    d_hidden: int
    position_axes: int = 1
    rope_base: float | None = 10_000.0
    pattern: tuple[Block | None, ...] = ()
    mlp_kind: MlpKind = "gelu"
    eps: float = 1e-6
    causal: bool = False

    def __post_init__(self) -> None:
        require_no_routers(self.pattern, "StackConfig")
        if min(self.d_model, self.layers, self.heads, self.d_hidden) < 1:
            sizes = f"d_model={self.d_model}, layers={self.layers}, heads={self.heads} and d_hidden={self.d_hidden}"
            raise ValueError(f"StackConfig: {sizes} must be at least 1")
        if self.rope_base is None:
            if self.d_model % self.heads:
                raise ValueError(f"d_model={self.d_model} over heads={self.heads} must give a whole head dim")
            return
        if self.d_model % self.heads or (self.d_model // self.heads) % 2:
            raise ValueError(f"d_model={self.d_model} over heads={self.heads} must give a whole, even head dim")
        if self.d_model // self.heads // 2 < self.position_axes:
            raise ValueError(
                f"a head dim of {self.d_model // self.heads} has {self.d_model // self.heads // 2} rotary pairs, "
                f"fewer than the {self.position_axes} position axes"
            )

    @property
    def attention(self) -> AttentionConfig:
        """The attention of each layer."""
        turns = self.rope_base is not None
        return AttentionConfig(
            d_model=self.d_model,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.d_model // self.heads,
            bias=True,
            out_bias=True,
            causal=self.causal,
            rope_base=self.rope_base,
            rope_sections=_sections(self.d_model // self.heads // 2, self.position_axes) if turns else None,
            rope_per_axis_ladder=turns and self.position_axes > 1,
        )

    @property
    def mlp(self) -> MlpConfig:
        """The MLP of each layer."""
        return MlpConfig(self.d_model, self.d_hidden, kind=self.mlp_kind, bias=True)


def _sections(pairs: int, axes: int) -> tuple[int, ...] | None:
    """Rotary pairs per position axis, the first axes taking what does not divide evenly; None for one axis."""
    if axes == 1:
        return None
    return tuple(pairs // axes + (i < pairs % axes) for i in range(axes))


def layer_with(cfg: StackConfig, *, attention: Block | None = None, mlp: Block | None = None) -> Block:
    """The layer of this configuration with another attention or another MLP, for `StackConfig.pattern`."""
    return residual_layer(
        cfg.d_model,
        attention=attention or attention_block(cfg.attention),
        mlp=mlp or mlp_block(cfg.mlp),
        eps=cfg.eps,
        kind="layer",
        norms=("norm_attention", "norm_mlp"),
    )


def layer_block(cfg: StackConfig, layer: int) -> Block:
    """The block that layer number `layer` is: that of `pattern`, or the built-in one."""
    return in_turn(cfg.pattern, layer) or layer_with(cfg)


def specs(cfg: StackConfig) -> dict[str, Any]:
    """`layers.<i>.{norm_attention, attention, norm_mlp, mlp}`, or what a layer of your own has, and `norm_out`."""
    gain = (2 * cfg.layers) ** -0.5
    layers = [layer_block(cfg, i).specs(gain) for i in range(cfg.layers)]
    return {"layers": layers, "norm_out": norm.specs(cfg.d_model, kind="layer")}


def apply(
    params: Any, x_TD: Tensor, *, positions: Tensor, segments_T: Segments, cfg: StackConfig, whole: bool = False
) -> Tensor:
    """`[T, D]` to normalised `[T, D]`; `positions` int64 `[T]`, or `[A, T]` for several axes; each item by itself.

    `segments_T`: ids of the items, int64 `[T]`, or `Documents`. `whole`: a rank of a mesh has items of its own, whole.
    ValueError where a layer changes the shape or the dtype of the rows.

    >>> import torch
    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = StackConfig(16, layers=1, heads=2, d_hidden=32)
    >>> params, place_T = spec.init(specs(cfg), random.key(0)), torch.tensor([0, 1, 0])
    >>> out_TD = apply(params, torch.eye(3, 16), positions=place_T, segments_T=torch.tensor([0, 0, 1]), cfg=cfg)
    >>> list(out_TD.shape)
    [3, 16]
    """
    at = (WholeItems if whole else Context)(positions, segments_T=segments_T)
    at.rope(cfg.attention)  # before the layers, of which it is no part
    for i, layer in enumerate(params["layers"]):
        x_TD = at.run_layer(layer_block(cfg, i), layer, x_TD, layer=i)
    return norm.apply(params["norm_out"], x_TD, eps=cfg.eps)
