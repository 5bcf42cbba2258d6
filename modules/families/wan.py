"""Wan's video transformer: latents of clips, folded into one pack, at times of their own, that read text and pictures.

As `ftrain.modules.dit`, with differences that matter for equal numbers: queries and keys are normed across all heads,
positions turn pairs of neighbours, the text is an MLP's output of 512 rows of which none is hidden, and the residual
stream, the norms, and all that comes of the time are float32 (or wider) whatever the weights are. Source: Wan team,
arXiv 2503.20314.

Legend: N rows of the pack (patches of latents), P numbers of a row of the input, Q of the output, D width, H heads, K
head dim, M times, S text rows, C width of text, I rows of pictures, F hidden width, A = 3 position axes.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ftrain.kernels.attention import attention
from ftrain.kernels.documents import Segments, one_document
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.embedding import embedding
from ftrain.kernels.rms_norm import rms_norm
from ftrain.kernels.rope import rope, rope_table
from ftrain.modules import linear, mlp, norm
from ftrain.modules.families.wan_config import WanConfig
from ftrain.modules.linear import affine
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.spec import Normal, ParamSpec, Tree, fan_in, ones, zeros


def specs(cfg: WanConfig) -> dict[str, Any]:
    """`patch`, `time`, `text`, `image` (where pictures are read), `layers`, `out`. At the start the velocity is zero.

    >>> from ftrain.modules import spec
    >>> from ftrain.modules.families.wan_config import PUBLISHED, config
    >>> spec.count(specs(config(PUBLISHED["2.1-t2v-1.3b"])))
    1418996800
    """
    d, small = cfg.d_model, Normal(0.02)
    kernel: tuple[str | None, ...] = ("conv_out", "conv_in", "conv_kernel", "conv_kernel", "conv_kernel")
    tree = {
        "patch": {
            "w_DCFHW": ParamSpec((d, cfg.channels_in, *cfg.patch), kernel, fan_in(cfg.row_in)),
            "b_D": ParamSpec((d,), ("embed",), zeros()),
        },
        "time": {
            "in": linear.specs(cfg.time_features, d, ("time", "embed"), bias=True, init=small),
            "hidden": linear.specs(d, d, ("embed", "embed"), bias=True, init=small),
            "six": linear.specs(d, 6 * d, ("embed", "mlp"), bias=True),
        },
        "text": {
            "in": linear.specs(cfg.d_text, d, ("embed", "mlp"), bias=True, init=small),
            "out": linear.specs(d, d, ("mlp", "embed"), bias=True, init=small),
        },
        "layers": [_layer_specs(cfg) for _ in range(cfg.layers)],
        "out": {
            "table_12D": ParamSpec((1, 2, d), (None, None, "embed"), Normal(d**-0.5)),
            "w_DQ": ParamSpec((d, cfg.row_out), ("embed", "patch"), zeros()),
            "b_Q": ParamSpec((cfg.row_out,), ("patch",), zeros()),
        },
    }
    return {**tree, "image": _image_specs(cfg)} if cfg.d_image else tree


def _image_specs(cfg: WanConfig) -> dict[str, Any]:
    wide, d = cfg.d_image, cfg.d_model
    tree: dict[str, Any] = {
        "norm_in": norm.specs(wide, kind="layer"),
        "in": linear.specs(wide, wide, ("embed", "mlp"), bias=True),
        "out": linear.specs(wide, d, ("mlp", "embed"), bias=True),
        "norm_out": norm.specs(d, kind="layer"),
    }
    if cfg.image_places:
        tree["places_1IC"] = ParamSpec((1, cfg.image_places, wide), (None, None, "embed"), zeros())
    return tree


def _layer_specs(cfg: WanConfig) -> dict[str, Any]:
    d, text = cfg.d_model, _attention_specs(cfg.d_model)
    if cfg.d_image:
        text |= _heads_specs(d, "k_image") | _heads_specs(d, "v_image")
        text["k_image_norm_HK"] = ParamSpec((d,), ("heads",), ones())
    tree = {
        "table_16D": ParamSpec((1, 6, d), (None, None, "embed"), Normal(d**-0.5)),
        "attention": _attention_specs(d),
        "text": text,
        "mlp": mlp.specs(_mlp(cfg)),
    }
    return {**tree, "text_norm": norm.specs(d, kind="layer")} if cfg.text_norm else tree


def _attention_specs(d: int) -> dict[str, ParamSpec]:
    return {
        **_heads_specs(d, "q"),
        **_heads_specs(d, "k"),
        **_heads_specs(d, "v"),
        "q_norm_HK": ParamSpec((d,), ("heads",), ones()),
        "k_norm_HK": ParamSpec((d,), ("heads",), ones()),
        "w_o_HKD": ParamSpec((d, d), ("heads", "embed"), fan_in(d)),
        "b_o_D": ParamSpec((d,), ("embed",), zeros()),
    }


def _heads_specs(d: int, name: str) -> dict[str, ParamSpec]:
    return {
        f"w_{name}_DHK": ParamSpec((d, d), ("embed", "heads"), fan_in(d)),
        f"b_{name}_HK": ParamSpec((d,), ("heads",), zeros()),
    }


def _mlp(cfg: WanConfig) -> MlpConfig:
    return MlpConfig(cfg.d_model, cfg.d_hidden, kind="gelu_tanh", bias=True)


class Read(NamedTuple):
    """Rows that latents read beside each other, `[S, D]`, and the documents of both between which attention runs."""

    rows_SD: Tensor
    segments_N: Segments
    segments_S: Segments


class Times(NamedTuple):
    """What the times of the pack say to each layer.

    `six_M6D`: shifts, scales and gates, float32 or wider. `rows_N`: int64, the number of each row's time; None where
    all rows have the one time.
    """

    six_M6D: Tensor
    rows_N: Tensor | None

    def modulated(self, table_1XD: Tensor, six_MXD: Tensor) -> tuple[Tensor, ...]:
        """The X vectors `table + six` of each row, `[N, D]`, or `[1, D]` where all rows have one time."""
        found = (table_1XD.to(six_MXD.dtype) + six_MXD).unbind(1)
        return found if self.rows_N is None else tuple(embedding(self.rows_N, x_MD) for x_MD in found)


def apply(
    params: Tree,
    x_NP: Tensor,
    *,
    times_M: Tensor,
    positions_AN: Tensor,
    text_SC: Tensor,
    cfg: WanConfig,
    time_rows_N: Tensor | None = None,
    segments_N: Segments | None = None,
    text_segments_S: Segments | None = None,
    image_IC: Tensor | None = None,
    image_segments_I: Segments | None = None,
) -> Tensor:
    """Rows of latents `[N, P]` to velocities `[N, Q]`, float32 or wider.

    - `x_NP`, and the result: patches in the order of `ftrain.modules.families.wan_latents.patchify`, channels first;
      where there are conditions, they are the last channels.
    - `times_M`: floating, in [0, 1], 1 being noise. `time_rows_N`: int64, which of them is each row's; may be left out
      where there is one.
    - `positions_AN`: int64 `[3, N]`, frame, row and column of each patch in its clip.
    - `text_SC`: `text_rows` rows for each clip, filled up with zeros. `image_IC`: rows of the image encoder, for a
      model that has `d_image`.
    - `segments_N`, `text_segments_S`, `image_segments_I`: ids of documents, int64, or `Documents` (see
      `ftrain.kernels.documents.aligned_documents`); latents read the text and the pictures of their own clip. All may
      be left out where the pack is one clip.

    ValueError for several times without `time_rows_N`, segments of the one and not of the other, and pictures given to
    a model without them, or missing.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = WanConfig(4, 4, d_model=24, layers=1, heads=2, d_hidden=32, d_text=8, time_features=8)
    >>> params, at_AN = spec.init(specs(cfg), random.key(0)), torch.zeros(3, 1, dtype=torch.int64)
    >>> given = {"times_M": torch.ones(1), "positions_AN": at_AN, "text_SC": torch.zeros(512, 8)}
    >>> list(apply(params, torch.ones(1, 16), **given, cfg=cfg).shape)
    [1, 16]
    """
    _check(times_M, time_rows_N, image_IC, cfg)
    narrow = params["patch"]["b_D"].dtype
    wide = accumulate_dtype(narrow)
    hidden_MD, times = _times(params["time"], times_M, time_rows_N, wide, cfg)
    text_SD = _read_in(params["text"], text_SC.to(narrow), "tanh")
    text = _beside("text", x_NP, segments_N, text_SD, text_segments_S)
    image = None
    if image_IC is not None:
        image = _beside("image", x_NP, segments_N, _image(params["image"], image_IC, narrow, cfg), image_segments_I)
    # one table for all layers, before them: it is no part of any
    table = rope_table(positions_AN, head_dim=cfg.head_dim, sections=cfg.rope_sections, per_axis_ladder=True)
    kernel_DP = params["patch"]["w_DCFHW"].flatten(1)
    x_ND = affine(x_NP.to(narrow), kernel_DP.mT, params["patch"]["b_D"]).to(wide)
    for layer in params["layers"]:
        x_ND = _layer(layer, x_ND, times, table, segments_N, text, image, cfg)
    shift, scale = times.modulated(params["out"]["table_12D"], hidden_MD[:, None].expand(-1, 2, -1))
    x_ND = _plain_norm(x_ND, cfg) * (1 + scale) + shift
    y_NQ = affine(x_ND.to(params["out"]["b_Q"].dtype), params["out"]["w_DQ"], params["out"]["b_Q"]).to(wide)
    # the head writes patches with channels last
    return y_NQ.unflatten(-1, (math.prod(cfg.patch), cfg.channels_out)).mT.flatten(1)


def _check(times_M: Tensor, time_rows_N: Tensor | None, image_IC: Tensor | None, cfg: WanConfig) -> None:
    if time_rows_N is None and len(times_M) != 1:
        raise ValueError(f"wan: there are {len(times_M)} times, and no time_rows_N says which row has which")
    if (image_IC is None) == bool(cfg.d_image):
        raise ValueError(
            f"wan: d_image={cfg.d_image}, but rows of pictures were {'not ' if image_IC is None else ''}given"
        )


def _times(
    params: Tree, times_M: Tensor, rows_N: Tensor | None, wide: torch.dtype, cfg: WanConfig
) -> tuple[Tensor, Times]:
    """The embedding of each time `[M, D]`, and what layers make of it."""
    half = cfg.time_features // 2
    # as the authors do, in float64: of times up to 1000 float32 has but four digits of a turn left
    steps = torch.arange(half, device=times_M.device, dtype=torch.float64)
    angles = 1000 * times_M.to(torch.float64)[:, None] * torch.exp(-math.log(10_000) / half * steps)
    features_ME = torch.cat([angles.cos(), angles.sin()], -1).to(wide)
    hidden_MD = _cast_linear(params["hidden"], nnf.silu(_cast_linear(params["in"], features_ME)))
    six_MX = _cast_linear(params["six"], nnf.silu(hidden_MD)).to(wide)
    return hidden_MD.to(wide), Times(six_MX.unflatten(-1, (6, cfg.d_model)), rows_N)


def _cast_linear(params: Tree, x_MI: Tensor) -> Tensor:
    """In the dtype of the weights, which may be wider than that of the others."""
    return linear.apply(params, x_MI.to(params["w"].dtype))


def _read_in(params: Tree, x_SC: Tensor, approximate: str) -> Tensor:
    return linear.apply(params["out"], nnf.gelu(linear.apply(params["in"], x_SC), approximate=approximate))


def _image(params: Tree, image_IC: Tensor, narrow: torch.dtype, cfg: WanConfig) -> Tensor:
    """Rows of the image encoder as rows of the stream's width."""
    image_IC = image_IC.to(accumulate_dtype(narrow))
    if cfg.image_places:
        if len(image_IC) % cfg.image_places:
            raise ValueError(f"wan: {len(image_IC)} rows of pictures are not {cfg.image_places} for each clip")
        places_IC = params["places_1IC"][0].to(image_IC.dtype)
        image_IC = (image_IC.unflatten(0, (-1, cfg.image_places)) + places_IC).flatten(0, 1)
    inner_IC = norm.apply(params["norm_in"], image_IC, eps=1e-5).to(narrow)
    return norm.apply(params["norm_out"], _read_in(params, inner_IC, "none"), eps=1e-5)


def _beside(what: str, x_NP: Tensor, own: Segments | None, rows_SD: Tensor, theirs: Segments | None) -> Read:
    if (own is None) != (theirs is None):
        raise ValueError(f"wan: give segments of both latents and {what}, or of neither where the pack is one clip")
    if own is None or theirs is None:
        return Read(rows_SD, one_document(x_NP), one_document(rows_SD))
    return Read(rows_SD, own, theirs)


def _layer(
    params: Tree,
    x_ND: Tensor,
    times: Times,
    table: tuple[Tensor, Tensor],
    segments_N: Segments | None,
    text: Read,
    image: Read | None,
    cfg: WanConfig,
) -> Tensor:
    narrow = params["attention"]["b_q_HK"].dtype
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = times.modulated(params["table_16D"], times.six_M6D)
    inner_ND = (_plain_norm(x_ND, cfg) * (1 + scale_a) + shift_a).to(narrow)
    x_ND = x_ND + gate_a * _attend(params["attention"], inner_ND, table, segments_N, cfg)
    inner_ND = norm.apply(params["text_norm"], x_ND, eps=cfg.norm_eps) if cfg.text_norm else x_ND
    x_ND = x_ND + _read(params["text"], inner_ND.to(narrow), text, image, cfg)
    inner_ND = (_plain_norm(x_ND, cfg) * (1 + scale_m) + shift_m).to(narrow)
    return x_ND + gate_m * mlp.apply(params["mlp"], inner_ND, cfg=_mlp(cfg))


def _attend(
    params: Tree, x_ND: Tensor, table: tuple[Tensor, Tensor], segments_N: Segments | None, cfg: WanConfig
) -> Tensor:
    """Attention among the latents of a clip."""
    q_NHK, k_NHK = (rope(_heads(params, x, x_ND, cfg), *table, layout="interleaved") for x in "qk")
    v_NHK = _heads(params, "v", x_ND, cfg)
    read_NHK = attention(q_NHK, k_NHK, v_NHK, segments_T=segments_N, causal=False)
    return affine(read_NHK.flatten(1), params["w_o_HKD"], params["b_o_D"])


def _read(params: Tree, x_ND: Tensor, text: Read, image: Read | None, cfg: WanConfig) -> Tensor:
    """Attention from latents to the text of their clip, and to its pictures by keys and values of their own."""
    q_NHK = _heads(params, "q", x_ND, cfg)

    def read(of: Read, kind: str) -> Tensor:
        k_SHK, v_SHK = (_heads(params, f"{x}{kind}", of.rows_SD, cfg) for x in "kv")
        return attention(
            q_NHK, k_SHK, v_SHK, segments_T=of.segments_N, kv_segments_S=of.segments_S, causal=False
        ).flatten(1)

    read_ND = read(text, "") if image is None else read(text, "") + read(image, "_image")
    return affine(read_ND, params["w_o_HKD"], params["b_o_D"])


def _heads(params: Tree, name: str, x_ND: Tensor, cfg: WanConfig) -> Tensor:
    """Queries, keys or values `[N, H, K]`: the first two are normed across all heads."""
    x_NX = affine(x_ND, params[f"w_{name}_DHK"], params[f"b_{name}_HK"])
    if not name.startswith("v"):
        x_NX = rms_norm(x_NX, params[f"{name}_norm_HK"], eps=cfg.norm_eps)
    return x_NX.unflatten(-1, (cfg.heads, cfg.head_dim))


def _plain_norm(x_ND: Tensor, cfg: WanConfig) -> Tensor:
    """A layer norm without weights: scale and shift come from the time."""
    return nnf.layer_norm(x_ND, x_ND.shape[-1:], eps=cfg.norm_eps)
