"""A diffusion transformer over packed latents: adaptive norms from the time, self attention, text, an MLP.

As in DiT (Peebles and Xie 2023) with one projection of the time for all layers and a learned table per layer (PixArt,
Chen et al. 2023; Wan 2025): `x += gate * f(norm(x) * (1 + scale) + shift)`; shift, scale and gate of attention and of
the MLP are `table_6D + time_6D`. Documents of latents lie side by side; each row has a time of its own. Trained by flow
matching (Lipman et al. 2023): at time t the input is `(1 - t) data + t noise`, the output is `noise - data`.

Each layer is a `Block` (modules/block.py), the built-in one or another that the configuration gives, as in a decoder;
its `Context` is a `Conditions`, which also has the time and the text.

Legend: N latent rows of the pack, P numbers in a row, D width, S text rows, C width of text, F hidden width, A = 3
position axes.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ftrain.kernels.attention import attention as attend
from ftrain.kernels.documents import Segments, one_document
from ftrain.kernels.mean import Mean
from ftrain.modules import linear, norm
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Context, in_turn, require_no_routers
from ftrain.modules.layers import attention_block, mlp_block
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.spec import Normal, ParamSpec, zeros


@dataclass(frozen=True)
class DitConfig:
    """`layers` layers `d_model` wide over rows of `d_in` numbers (a patch of latents).

    `d_text`: width of the text rows that every row attends to, 0 for none. `time_features`: sines and cosines of the
    time, an even number. Positions have three axes (frame, row, column), with `rope_base`.

    `pattern`: layers of your own, in turn: layer i is `pattern[i % len(pattern)]`, where None is the layer that the
    other fields describe. `layer_with` makes one of those with another MLP or attention in it.

    Raises:
        ValueError: `d_model` over `heads` is no even whole number, `time_features` is odd, or a block of `pattern` has
            routers.
    """

    d_in: int
    d_model: int
    layers: int
    heads: int
    d_hidden: int
    d_text: int = 0
    time_features: int = 256
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    pattern: tuple[Block | None, ...] = ()

    def __post_init__(self) -> None:
        require_no_routers(self.pattern, "DitConfig")
        if self.d_model % self.heads or self.d_model // self.heads % 2:
            raise ValueError(f"DitConfig: d_model={self.d_model} must give heads={self.heads} an even width each")
        if self.time_features % 2:
            raise ValueError(f"DitConfig: time_features={self.time_features} must be even: sines and cosines")

    @property
    def attention(self) -> AttentionConfig:
        """Attention over latents, not causal; the frequencies are split among the axes as Wan does."""
        head_dim = self.d_model // self.heads
        pairs = head_dim // 2
        sections = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        return AttentionConfig(
            self.d_model, self.heads, self.heads, head_dim, qk_norm=True, norm_eps=self.norm_eps, bias=True,
            out_bias=True, causal=False, rope_base=self.rope_base, rope_sections=sections,
        )  # fmt: skip

    @property
    def mlp(self) -> MlpConfig:
        """The MLP of a layer."""
        return MlpConfig(self.d_model, self.d_hidden, kind="gelu_tanh", bias=True)


def specs(cfg: DitConfig) -> dict[str, Any]:
    """`patch`, `time` (two maps and the projection to six), `layers`, `out`; all gates start at zero."""
    d = cfg.d_model
    return {
        "patch": linear.specs(cfg.d_in, d, ("patch", "embed"), bias=True),
        "time": {
            "in": linear.specs(cfg.time_features, d, ("time", "embed"), bias=True),
            "hidden": linear.specs(d, d, ("embed", "embed"), bias=True),
            "six": {"w": ParamSpec((d, 6 * d), ("embed", "mlp"), zeros()), "b": ParamSpec((6 * d,), ("mlp",), zeros())},
        },
        "layers": [layer_block(cfg, i).specs(1.0) for i in range(cfg.layers)],
        "out": {
            "table_2D": ParamSpec((2, d), (None, "embed"), Normal(d**-0.5)),
            "w_DP": ParamSpec((d, cfg.d_in), ("embed", "patch"), zeros()),
            "b_P": ParamSpec((cfg.d_in,), ("patch",), zeros()),
        },
    }


def time_embedding(time_N: Tensor, features: int) -> Tensor:
    """Cosines, then sines, of `1000 t` at `features / 2` frequencies from 1 to 1/10,000, `[N, features]`."""
    half = features // 2
    dtype = torch.promote_types(time_N.dtype, torch.float32)
    steps = torch.arange(half, device=time_N.device, dtype=dtype)
    angles = 1000 * time_N.to(dtype)[:, None] * torch.exp(-math.log(10_000) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], -1)


def apply(
    params: dict[str, Any],
    x_NP: Tensor,
    *,
    time_N: Tensor,
    positions_AN: Tensor,
    segments_N: Segments | None,
    cfg: DitConfig,
    text_SC: Tensor | None = None,
    text_segments_S: Segments | None = None,
) -> Tensor:
    """Latent rows `[N, P]` at times `[N]` in [0, 1] to velocities `[N, P]`.

    `positions_AN`: int64 `[3, N]`. `segments_N`, `text_segments_S`: int64 ids of documents, or `Documents` of both (see
    `ftrain.kernels.documents.aligned_documents`); latents attend to the text of their own document. ValueError where
    text is given to a model without it, or is missing, and where a layer changes the shape or the dtype of the rows.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = DitConfig(d_in=4, d_model=24, layers=1, heads=2, d_hidden=48)
    >>> params, x_NP = spec.init(specs(cfg), random.key(0)), torch.ones(5, 4)
    >>> at_AN = torch.stack([torch.zeros(5, dtype=torch.int64), torch.arange(5), torch.arange(5)])
    >>> list(apply(params, x_NP, time_N=torch.full((5,), 0.5), positions_AN=at_AN, segments_N=None, cfg=cfg).shape)
    [5, 4]
    """
    if (text_SC is None) != (cfg.d_text == 0):
        raise ValueError(f"dit: d_text={cfg.d_text}, but text was {'not ' if text_SC is None else ''}given")
    x_ND = linear.apply(params["patch"], x_NP)
    time_ND, time_N6D = embedded_time(params, time_N, x_ND.dtype, cfg)
    text = None if text_SC is None else _text(x_ND, segments_N, text_SC, text_segments_S)
    at = Conditions(positions_AN, segments_T=segments_N, time_N6D=time_N6D, text=text)
    return velocities(params, through_layers(params, x_ND, at, cfg), time_ND, cfg)


def embedded_time(params: dict[str, Any], time_N: Tensor, dtype: torch.dtype, cfg: DitConfig) -> tuple[Tensor, Tensor]:
    """Times `[N]` as the head reads them, `[N, D]`, and what they add to the tables of layers, `[N, 6, D]`."""
    features_NE = time_embedding(time_N, cfg.time_features).to(dtype)
    time_ND = linear.apply(params["time"]["hidden"], nnf.silu(linear.apply(params["time"]["in"], features_NE)))
    return time_ND, linear.apply(params["time"]["six"], nnf.silu(time_ND)).unflatten(-1, (6, cfg.d_model))


def through_layers(params: dict[str, Any], x_ND: Tensor, at: "Conditions", cfg: DitConfig) -> Tensor:
    """The rows `[N, D]` behind the last layer. ValueError where a layer changes their shape or dtype."""
    at.rope(cfg.attention)  # before the layers, of which it is no part
    for i, layer in enumerate(params["layers"]):
        x_ND = at.run_layer(layer_block(cfg, i), layer, x_ND, layer=i)
    return x_ND


def velocities(params: dict[str, Any], x_ND: Tensor, time_ND: Tensor, cfg: DitConfig) -> Tensor:
    """Rows behind the last layer `[N, D]` as velocities `[N, P]`; `time_ND`: of `embedded_time`."""
    shift_ND, scale_ND = (params["out"]["table_2D"] + time_ND[:, None]).unbind(1)
    x_ND = _plain_norm(x_ND, cfg) * (1 + scale_ND) + shift_ND
    return linear.affine(x_ND, params["out"]["w_DP"], params["out"]["b_P"])


class Text(NamedTuple):
    """Text rows `[S, C]`, and the documents of latents and of text between which attention runs."""

    text_SC: Tensor
    segments_N: Segments
    segments_S: Segments


def _text(x_ND: Tensor, segments_N: Segments | None, text_SC: Tensor, text_segments_S: Segments | None) -> Text:
    """Without documents of both, all latents read all text."""
    if segments_N is None or text_segments_S is None:
        return Text(text_SC, one_document(x_ND), one_document(text_SC))
    return Text(text_SC, segments_N, text_segments_S)


@dataclass(frozen=True, eq=False, kw_only=True)
class Conditions(Context):
    """`Context` of latents: T is N.

    `time_N6D`: what the time adds to each layer's table of shifts, scales and gates. `text`: what latents read beside
    each other; None without text.
    """

    time_N6D: Tensor
    text: Text | None = None


def layer_with(cfg: DitConfig, *, attention: Block | None = None, mlp: Block | None = None) -> Block:
    """The layer of this configuration with another attention or another MLP, for `DitConfig.pattern`.

    Either gets normed rows, scaled and shifted by the time, and what it returns is gated. `apply` of the layer raises
    ValueError where its context is not a `Conditions`.
    """
    reads, maps = attention or attention_block(cfg.attention), mlp or mlp_block(cfg.mlp)

    def specs(out_gain: float) -> dict[str, Any]:
        table = ParamSpec((6, cfg.d_model), (None, "embed"), zeros())
        tree = {"table_6D": table, "attention": reads.specs(out_gain), "mlp": maps.specs(out_gain)}
        return tree | {"text": _text_specs(cfg)} if cfg.d_text else tree

    def apply(params: Any, x_ND: Tensor, at: Context) -> Tensor:
        if not isinstance(at, Conditions):
            raise ValueError("a layer of a diffusion transformer needs the time: run it by dit.apply")
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (params["table_6D"] + at.time_N6D).unbind(1)
        normed_ND = _plain_norm(x_ND, cfg) * (1 + scale_a) + shift_a
        x_ND = x_ND + gate_a * at.run(reads, params["attention"], normed_ND)
        if at.text is not None:
            x_ND = x_ND + _read_text(params["text"], x_ND, at.text, cfg)
        normed_ND = _plain_norm(x_ND, cfg) * (1 + scale_m) + shift_m
        return x_ND + gate_m * at.run(maps, params["mlp"], normed_ND)

    return Block(specs, apply, routers=(*reads.routers, *maps.routers))


def layer_block(cfg: DitConfig, layer: int) -> Block:
    """The block that layer number `layer` is: that of `pattern`, or the built-in one."""
    return in_turn(cfg.pattern, layer) or layer_with(cfg)


def _text_specs(cfg: DitConfig) -> dict[str, Any]:
    d = cfg.d_model
    return {
        "norm": norm.specs(d),
        "query": linear.specs(d, d, ("embed", "heads"), bias=True),
        "key": linear.specs(cfg.d_text, d, ("embed", "heads"), bias=True),
        "value": linear.specs(cfg.d_text, d, ("embed", "heads"), bias=True),
        "out": linear.specs(d, d, ("heads", "embed"), bias=True),
    }


def _read_text(params: dict[str, Any], x_ND: Tensor, text: Text, cfg: DitConfig) -> Tensor:
    """Attention from latents to the text of their document."""
    width = (cfg.heads, cfg.d_model // cfg.heads)
    q_NHK = linear.apply(params["query"], norm.apply(params["norm"], x_ND, eps=cfg.norm_eps)).unflatten(-1, width)
    k_SHK = linear.apply(params["key"], text.text_SC).unflatten(-1, width)
    v_SHK = linear.apply(params["value"], text.text_SC).unflatten(-1, width)
    own, read = text.segments_N, text.segments_S
    out_NHK = attend(q_NHK, k_SHK, v_SHK, segments_T=own, kv_segments_S=read, causal=False)
    return linear.apply(params["out"], out_NHK.flatten(1))


def _plain_norm(x_ND: Tensor, cfg: DitConfig) -> Tensor:
    """A layer norm without weights: scale and shift come from the time."""
    return nnf.layer_norm(x_ND, x_ND.shape[-1:], eps=cfg.norm_eps)


def noised(data_NP: Tensor, noise_NP: Tensor, time_N: Tensor) -> Tensor:
    """The input at time t: `(1 - t) data + t noise`.

    `data_NP`, `noise_NP`: `[N, P]` in one dtype; `time_N`: `[N]` in [0, 1].

    >>> noised(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([0.25, 1.0])).tolist()
    [[0.25], [1.0]]
    """
    return torch.lerp(data_NP, noise_NP, time_N.to(data_NP.dtype)[:, None])


def flow_loss(velocity_NP: Tensor, data_NP: Tensor, noise_NP: Tensor, valid_N: Tensor | None = None) -> Mean:
    """`squared_error` of the velocity `noise - data`. ValueError if `valid_N` is not bool `[N]`.

    >>> data_NP, noise_NP = torch.zeros(2, 3), torch.ones(2, 3)
    >>> flow_loss(torch.zeros(2, 3), data_NP, noise_NP, torch.tensor([True, False])).value().item()
    1.0
    """
    wide = functools.reduce(torch.promote_types, (velocity_NP.dtype, data_NP.dtype, noise_NP.dtype), torch.float32)
    return squared_error(velocity_NP, noise_NP.to(wide) - data_NP.to(wide), valid_N)


def squared_error(velocity_NP: Tensor, target_NP: Tensor, valid_N: Tensor | None = None) -> Mean:
    """Squared error over all numbers of the valid rows (bool `[N]`; None: all).

    Errors are taken and summed in at least float32, whatever the dtypes given. What the other rows hold, NaN included,
    reaches neither the loss nor a gradient. ValueError for a target of another shape, or if `valid_N` is not bool
    `[N]`.

    >>> squared_error(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([True, False])).value().item()
    1.0
    """
    if velocity_NP.shape != target_NP.shape:
        raise ValueError(
            f"the prediction has shape {list(velocity_NP.shape)} and the target {list(target_NP.shape)}: give a target "
            "of the prediction's shape"
        )
    wide = functools.reduce(torch.promote_types, (velocity_NP.dtype, target_NP.dtype), torch.float32)
    error_NP = velocity_NP.to(wide) - target_NP.to(wide)
    if valid_N is None:
        return Mean.of(error_NP.square())
    if valid_N.dtype != torch.bool or valid_N.shape != velocity_NP.shape[:1]:
        raise ValueError(
            f"squared error: valid_N is {valid_N.dtype} {list(valid_N.shape)}, expected bool [{len(velocity_NP)}]"
        )
    # selected before the square: its backward multiplies by the error, and 0 * NaN is NaN
    error_NP = torch.where(valid_N[:, None], error_NP, 0)
    return Mean(error_NP.square().sum(), valid_N.sum().to(wide) * velocity_NP.shape[1])
