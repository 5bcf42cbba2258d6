"""The vision towers of Qwen2-VL and its successors: patches of all pictures side by side, each frame by itself.

A frame attends within itself, in some layers (Qwen2.5-VL) within windows of it. Squares of patches are then merged into
the decoder's tokens; with `deep_layers` (DeepStack, Qwen3-VL) so are the hidden states behind some layers, which the
decoder adds to its own. What depends on the shapes of frames is computed before (`ftrain.modules.vision_media`).

Legend: N patches, D width, M width of a merged square, n = N / merge**2 tokens, H heads, K head dim, C numbers of a
patch, V width of the decoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.embedding import embedding
from ftrain.kernels.rope import rope as rotate
from ftrain.modules import norm
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Context, WholeItems
from ftrain.modules.layers import attention_block, mlp_block, residual_layer
from ftrain.modules.linear import affine
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.patch_grid import Grid
from ftrain.modules.spec import Normal, ParamSpec, Tree, fan_in, zeros

EPS = 1e-6
"""Of all norms."""


@dataclass(frozen=True)
class TowerConfig:
    """A tower `d_model` wide, of `layers` layers of `heads` heads with MLPs of `d_hidden`, for a decoder of `d_out`.

    A patch is `frames` frames of `patch` x `patch` pixels of `channels` channels; `merge` x `merge` patches become one
    token. `norm_kind`, `mlp_kind`, `mlp_bias`: of the layers; `patch_bias`: of the first projection. `window`: tokens a
    side of windows, which all layers but `full_layers` attend within; None: no layer does. `side`: rows and columns of
    a learned table of places; None: none. `deep_layers`: behind which the hidden states are merged too. `joint`:
    queries, keys and values are one projection.

    ValueError where heads do not divide the width into four equal parts, or a layer is named that is not there.
    """

    d_model: int
    layers: int
    heads: int
    d_hidden: int
    d_out: int
    patch: int = 14
    frames: int = 2
    channels: int = 3
    merge: int = 2
    norm_kind: norm.Kind = "layer"
    mlp_kind: Literal["swiglu", "gelu", "gelu_tanh", "quick_gelu"] = "quick_gelu"
    patch_bias: bool = False
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    side: int | None = None
    deep_layers: tuple[int, ...] = ()
    joint: bool = True
    rope_base: float = 10_000.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.d_model % self.heads or self.d_model // self.heads % 4:
            raise ValueError(
                f"TowerConfig: d_model={self.d_model} over heads={self.heads} must give heads of a multiple of 4 dims, "
                "rows and columns each turning pairs of half of them"
            )
        for name in ("full_layers", "deep_layers"):
            strange = [i for i in getattr(self, name) if not 0 <= i < self.layers]
            if strange:
                raise ValueError(f"TowerConfig: {name} names layer {strange[0]} of {self.layers}")

    @property
    def grid(self) -> Grid:
        """How frames are read."""
        return Grid(self.merge, self.window, self.side)

    @property
    def d_patch(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.frames * self.patch**2

    @property
    def d_merged(self) -> int:
        """The width of a merged square."""
        return self.d_model * self.merge**2

    @property
    def attention(self) -> AttentionConfig:
        """The attention of each layer."""
        head_dim = self.d_model // self.heads
        return AttentionConfig(
            self.d_model,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=head_dim,
            bias=True,
            out_bias=True,
            causal=False,
            rope_base=self.rope_base,
            rope_sections=(head_dim // 4, head_dim // 4),
            rope_per_axis_ladder=True,
        )


class Seen(NamedTuple):
    """What the decoder gets of pictures: `rows_nV`, and `deep`, more of the same shape for its first layers."""

    rows_nV: Tensor
    deep: tuple[Tensor, ...] = ()


def specs(cfg: TowerConfig) -> dict[str, Any]:
    """`patch`, `layers`, `merger`, and as configured `table_LD` (of places) and `deep`, a merger for each deep layer.

    >>> from ftrain.modules import spec
    >>> spec.count(specs(TowerConfig(16, layers=1, heads=2, d_hidden=32, d_out=24, patch=4)))
    9512
    """
    patch = (cfg.d_model, cfg.channels, cfg.frames, cfg.patch, cfg.patch)
    init = Normal(cfg.init_std)
    first = {"w_DCSYX": ParamSpec(patch, ("embed", None, None, None, None), fan_in(cfg.d_patch))}
    if cfg.patch_bias:
        first["b_D"] = ParamSpec((cfg.d_model,), ("embed",), zeros())
    gain, block = (2 * cfg.layers) ** -0.5, layer_block(cfg)
    tree: dict[str, Any] = {
        "patch": first,
        "layers": [block.specs(gain) for _ in range(cfg.layers)],
        "merger": _merger_specs(cfg, cfg.d_model),
    }
    if cfg.side is not None:
        tree["table_LD"] = ParamSpec((cfg.side**2, cfg.d_model), (None, "embed"), init)
    if cfg.deep_layers:
        tree["deep"] = [_merger_specs(cfg, cfg.d_merged) for _ in cfg.deep_layers]
    return tree


def _merger_specs(cfg: TowerConfig, normed: int) -> Tree:
    m, v = cfg.d_merged, cfg.d_out
    return {
        "norm": norm.specs(normed, kind=cfg.norm_kind),
        "w_up_MM": ParamSpec((m, m), ("embed", "mlp"), fan_in(m)),
        "b_up_M": ParamSpec((m,), ("mlp",), zeros()),
        "w_out_MV": ParamSpec((m, v), ("mlp", "embed"), fan_in(m)),
        "b_out_V": ParamSpec((v,), ("embed",), zeros()),
    }


def layer_block(cfg: TowerConfig) -> Block:
    """The layer: `norm1`, `attention` (`w_qkv_D3HK` `[D, 3 H K]`, `w_o_HKD` and their biases; as in
    `ftrain.modules.attention` unless they are joint), `norm2`, `mlp`.
    """
    mlp = MlpConfig(cfg.d_model, cfg.d_hidden, kind=cfg.mlp_kind, bias=True)
    return residual_layer(
        cfg.d_model,
        attention=_joint_attention(cfg.attention) if cfg.joint else attention_block(cfg.attention),
        mlp=mlp_block(mlp),
        eps=EPS,
        kind=cfg.norm_kind,
        norms=("norm1", "norm2"),
    )


def _joint_attention(cfg: AttentionConfig) -> Block:
    d, hk = cfg.d_model, cfg.heads * cfg.head_dim

    def specs(out_gain: float) -> Tree:
        return {
            "w_qkv_D3HK": ParamSpec((d, 3 * hk), ("embed", "heads"), fan_in(d)),
            "b_qkv_3HK": ParamSpec((3 * hk,), ("heads",), zeros()),
            "w_o_HKD": ParamSpec((hk, d), ("heads", "embed"), fan_in(hk, gain=out_gain)),
            "b_o_D": ParamSpec((d,), ("embed",), zeros()),
        }

    def apply(params: Any, x_ND: Tensor, at: Context) -> Tensor:
        table = at.rope(cfg)
        assert table is not None
        qkv_N3HK = affine(x_ND, params["w_qkv_D3HK"], params["b_qkv_3HK"]).unflatten(-1, (3, cfg.heads, cfg.head_dim))
        q_NHK, k_NHK, v_NHK = qkv_N3HK.unbind(1)
        read_NHK = at.attend(rotate(q_NHK, *table), rotate(k_NHK, *table), v_NHK, causal=False)
        return affine(read_NHK.flatten(1), params["w_o_HKD"], params["b_o_D"])

    return Block(specs, apply)


def apply(params: Any, media: Mapping[str, Any], cfg: TowerConfig) -> Seen:
    """Patches of pictures, as `ftrain.modules.vision_media` lays them, to the decoder's rows `[n, V]`.

    `media`: "pixels" `[N, C]`, "places" (row and column) `[N, 2]`, "frames" (`Documents`, or ids `[N]`), and as
    configured "windows" (the same), "taps" `[N, 4]` and "shares" `[N, 4]`. Computes in the dtype of the parameters.
    ValueError where N is not whole squares, or patches are of another size.
    """
    pixels_NC = media["pixels"]
    if pixels_NC.shape[-1] != cfg.d_patch or len(pixels_NC) % cfg.merge**2:
        raise ValueError(
            f"patches {list(pixels_NC.shape)}: the tower takes {cfg.d_patch} numbers of each, and whole squares of "
            f"{cfg.merge**2}"
        )
    x_ND = _patches(params, media, cfg)
    places_2N = media["places"].mT
    frames, layer = WholeItems(places_2N, segments_T=media["frames"]), layer_block(cfg)
    windows = frames if cfg.window is None else WholeItems(places_2N, segments_T=media["windows"])
    for at in (frames, windows):
        at.rope(cfg.attention)  # before the layers, of which it is no part
    deep = list[Tensor]()
    for i, own in enumerate(params["layers"]):
        x_ND = (frames if i in cfg.full_layers else windows).run_layer(layer, own, x_ND, layer=i)
        if i in cfg.deep_layers:
            merger = params["deep"][cfg.deep_layers.index(i)]
            deep.append(_merged(merger, x_ND.reshape(-1, cfg.d_merged), cfg))
    return Seen(_merged(params["merger"], x_ND, cfg), tuple(deep))


def _patches(params: Any, media: Mapping[str, Any], cfg: TowerConfig) -> Tensor:
    """The first rows, `[N, D]`: projected patches, with their places in the table."""
    w_CD = params["patch"]["w_DCSYX"].flatten(1).mT
    x_ND = affine(media["pixels"].to(w_CD.dtype), w_CD, params["patch"].get("b_D"))
    if cfg.side is None:
        return x_ND
    taps_N4D = embedding(media["taps"], params["table_LD"])
    return x_ND + (taps_N4D * media["shares"].to(x_ND.dtype)[..., None]).sum(1)


def _merged(params: Any, x: Tensor, cfg: TowerConfig) -> Tensor:
    """Squares of rows `[N, D]`, or squares `[n, M]` that are normed as one, to the decoder's `[n, V]`."""
    x_nM = norm.apply(params["norm"], x, eps=EPS).reshape(-1, cfg.d_merged)
    return affine(F.gelu(affine(x_nM, params["w_up_MM"], params["b_up_M"])), params["w_out_MV"], params["b_out_V"])
