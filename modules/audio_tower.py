"""The audio towers of Whisper, Qwen2.5-Omni and Qwen3-Omni (AuT): chunks of log-mel frames, side by side.

A recording is cut into chunks of equal length, the last filled up with silence; convolutions shorten each chunk by
itself, and rows attend within windows of a few chunks of one recording. What depends on lengths is computed before
(`ftrain.modules.sound_media`). Whisper (Radford et al. 2022) has one chunk of 30 seconds, Qwen2.5-Omni (arXiv
2503.20215) chunks of 2 seconds, whose pairs of rows become one, Qwen3-Omni (arXiv 2509.17765) chunks of one second,
eight to a window. A chunk that is not full is always filled up to its whole length, so that a recording's rows do not
depend on the others of a batch: transformers fills Qwen3-Omni's up to the longest of the batch.

Legend: C chunks, M mel bands, W frames of a chunk, R rows of a chunk, D width, N = C R rows, n tokens, V width of the
decoder, H channels of convolutions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.documents import ids_of
from ftrain.modules import norm
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, WholeItems
from ftrain.modules.layers import attention_block, mlp_block, residual_layer
from ftrain.modules.linear import affine
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.spec import Normal, ParamSpec, fan_in, zeros

EPS = 1e-5
"""Of all norms."""


@dataclass(frozen=True)
class AudioTowerConfig:
    """A tower `d_model` wide, of `layers` layers of `heads` heads with MLPs of `d_hidden`, over `mels` bands.

    `chunk`: frames of a chunk; `window`: chunks whose rows attend to each other. `channels`: of three convolutions over
    bands and frames, each of which halves both; None: two over frames, the second halves. `key_bias`: keys have a bias.
    `table`: places are learned, else sines and cosines. `paired`: the mean of two neighbouring rows is a token.
    `d_out`: the decoder's width (None: rows stay as they are), by one linear map, or with `deep_out` by two.
    `marks`: rows of a table that no sound reads, but that files of Qwen2.5-Omni hold.

    ValueError where heads do not divide the width, or pairs of rows would lie in two chunks.
    """

    d_model: int
    layers: int
    heads: int
    d_hidden: int
    chunk: int
    mels: int = 128
    window: int = 1
    channels: int | None = None
    key_bias: bool = False
    table: bool = False
    paired: bool = False
    d_out: int | None = None
    deep_out: bool = False
    marks: int = 0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.d_model % self.heads or self.d_model % 2:
            raise ValueError(f"AudioTowerConfig: d_model={self.d_model} over heads={self.heads} must give whole heads")
        if self.paired and self.rows % 2:
            raise ValueError(
                f"AudioTowerConfig: a chunk of {self.chunk} frames has {self.rows} rows, and pairs of them would lie "
                "in two chunks: give chunks of a multiple of 4 frames"
            )

    @property
    def rows(self) -> int:
        """Rows of a chunk."""
        return self.rows_of(self.chunk)

    def rows_of(self, frames: int) -> int:
        """Rows of so many frames of a chunk."""
        for _ in range(1 if self.channels is None else 3):
            frames = (frames - 1) // 2 + 1
        return frames

    def tokens_of(self, frames: int) -> int:
        """Tokens of a recording of so many frames."""
        whole, rest = divmod(frames, self.chunk)
        rows = whole * self.rows + (self.rows_of(rest) if rest else 0)
        return rows // 2 if self.paired else rows

    @property
    def attention(self) -> AttentionConfig:
        """The attention of each layer."""
        return AttentionConfig(
            self.d_model,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.d_model // self.heads,
            bias=True,
            key_bias=self.key_bias,
            out_bias=True,
            causal=False,
            rope_base=None,
        )


def specs(cfg: AudioTowerConfig) -> dict[str, Any]:
    """`convs` (a list of `w_OIt` or `w_OIyt` and `b_O`), `layers`, `norm_out`; as configured `w_in_HD` behind the
    convolutions, `table_RD`, `out`, and `marks_NV`.

    >>> from ftrain.modules import spec
    >>> spec.count(specs(AudioTowerConfig(8, layers=1, heads=2, d_hidden=16, chunk=20, mels=4, d_out=6)))
    966
    """
    d, h = cfg.d_model, cfg.channels
    sizes = [(cfg.mels, d), (d, d)] if h is None else [(1, h), (h, h), (h, h)]
    block, gain = layer_block(cfg), (2 * cfg.layers) ** -0.5
    tree: dict[str, Any] = {
        "convs": [_conv_specs(d_in, d_out, flat=h is None) for d_in, d_out in sizes],
        "layers": [block.specs(gain) for _ in range(cfg.layers)],
        "norm_out": norm.specs(d, kind="layer"),
    }
    if h is not None:
        inner = h * cfg.rows_of(cfg.mels)
        tree["w_in_HD"] = ParamSpec((inner, d), ("mlp", "embed"), fan_in(inner))
    if cfg.table:
        tree["table_RD"] = ParamSpec((cfg.rows, d), (None, "embed"), Normal(cfg.init_std))
    if cfg.d_out is not None:
        tree["out"] = _out_specs(cfg, cfg.d_out)
        if cfg.marks:
            tree["marks_NV"] = ParamSpec((cfg.marks, cfg.d_out), (None, "embed"), Normal(cfg.init_std))
    return tree


def _conv_specs(d_in: int, d_out: int, *, flat: bool) -> dict[str, ParamSpec]:
    taps = 1 if flat else 2
    axes = ("conv_out", "conv_in", *("conv_kernel",) * taps)
    weight = ParamSpec((d_out, d_in, *(3,) * taps), axes, fan_in(d_in * 3**taps))
    return {"w_OIt" if flat else "w_OIyt": weight, "b_O": ParamSpec((d_out,), ("channels",), zeros())}


def _out_specs(cfg: AudioTowerConfig, d_out: int) -> dict[str, ParamSpec]:
    d, found = cfg.d_model, dict[str, ParamSpec]()
    if cfg.deep_out:
        found["w_up_DF"] = ParamSpec((d, d), ("embed", "mlp"), fan_in(d))
        found["b_up_F"] = ParamSpec((d,), ("mlp",), zeros())
    found["w_out_FV"] = ParamSpec((d, d_out), ("mlp", "embed"), fan_in(d))
    return {**found, "b_out_V": ParamSpec((d_out,), ("embed",), zeros())}


def layer_block(cfg: AudioTowerConfig) -> Block:
    """The layer: `norm1`, `attention` (`ftrain.modules.attention`), `norm2`, `mlp`."""
    return residual_layer(
        cfg.d_model,
        attention=attention_block(cfg.attention),
        mlp=mlp_block(MlpConfig(cfg.d_model, cfg.d_hidden, kind="gelu", bias=True)),
        eps=EPS,
        kind="layer",
        norms=("norm1", "norm2"),
    )


def apply(params: Any, sound: Mapping[str, Any], cfg: AudioTowerConfig) -> Tensor:
    """Chunks of recordings, as `ftrain.modules.sound_media` lays them, to rows: the decoder's, `[n, V]` with n = N, or
    half of it where rows are paired; or without `d_out` the tower's own `[N, D]`.

    `sound`: "mel" `[C, M, W]`, "heard" `[C]` (how many frames of each are no filling), and "parts" (ids `[N]` of what
    attends to itself, or `Documents`). Computes in the dtype of the parameters. ValueError where chunks are of
    another size.
    """
    mel_CMW = sound["mel"]
    if mel_CMW.dim() != 3 or mel_CMW.shape[1:] != (cfg.mels, cfg.chunk):
        raise ValueError(
            f"sound {list(mel_CMW.shape)}: the tower takes chunks of {cfg.mels} x {cfg.chunk} bands and frames"
        )
    x_CRD = _shortened(params, mel_CMW, sound["heard"], cfg)
    x_CRD = x_CRD + (params["table_RD"] if cfg.table else sines(cfg.rows, cfg.d_model, x_CRD))
    x_ND, parts = x_CRD.flatten(0, 1), sound["parts"]
    at, layer = WholeItems(ids_of(parts), segments_T=parts), layer_block(cfg)
    for i, own in enumerate(params["layers"]):
        x_ND = at.run_layer(layer, own, x_ND, layer=i)
    if cfg.paired:
        x_ND = x_ND.unflatten(0, (-1, 2)).mean(1)
    x_ND = norm.apply(params["norm_out"], x_ND, eps=EPS)
    return x_ND if cfg.d_out is None else _out(params["out"], x_ND)


def _shortened(params: Any, mel_CMW: Tensor, heard_C: Tensor, cfg: AudioTowerConfig) -> Tensor:
    """The convolutions, `[C, R, D]`."""
    convs = params["convs"]
    if cfg.channels is None:
        first, second = convs
        x_CDW = F.gelu(F.conv1d(mel_CMW.to(first["w_OIt"].dtype), first["w_OIt"], first["b_O"], padding=1))
        within_CW = torch.arange(cfg.chunk, device=heard_C.device) < heard_C[:, None]
        x_CDW = x_CDW * within_CW[:, None].to(x_CDW.dtype)
        return F.gelu(F.conv1d(x_CDW, second["w_OIt"], second["b_O"], stride=2, padding=1)).mT
    x_CHMW = mel_CMW.to(params["w_in_HD"].dtype)[:, None]
    for conv in convs:
        x_CHMW = F.gelu(F.conv2d(x_CHMW, conv["w_OIyt"], conv["b_O"], stride=2, padding=1))
    return affine(x_CHMW.permute(0, 3, 1, 2).flatten(2), params["w_in_HD"])


def sines(length: int, d: int, like: Tensor) -> Tensor:
    """Sines, then cosines, of places, `[length, d]` in the dtype and on the device of `like`; computed in float32."""
    step = math.log(10_000) / (d // 2 - 1) if d > 2 else 0.0
    ladder = torch.exp(-step * torch.arange(d // 2, device=like.device, dtype=torch.float32))
    angle = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * ladder
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(like.dtype)


def _out(params: Any, x_nD: Tensor) -> Tensor:
    if "w_up_DF" in params:
        x_nD = F.gelu(affine(x_nD, params["w_up_DF"], params["b_up_F"]))
    return affine(x_nD, params["w_out_FV"], params["b_out_V"])
