"""Mimi, a residual audio codec: a waveform to codes of several levels at 12.5 frames a second, and back.

SEANet's convolutions, a causal transformer over a window, halving once more, then a split quantizer: the first levels
(semantic) and the rest (acoustic) quantize the same latents, each residually. All looks back alone. Leaves are called
as transformers' files call them, but in the two transformers, which are the house's blocks. Source: Defossez et al.,
Moshi, arXiv 2410.00037.

Legend: B recordings, C channels, S samples, F frames of latents, L frames of the transformer, D width, Q levels, K
entries of a level, Z width of an entry.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ftrain.modules import codebook, codebook_averages, seanet
from ftrain.modules.block import Block, Context, WholeItems
from ftrain.modules.codebook import Quantized
from ftrain.modules.families.family import tensors
from ftrain.modules.families.mimi_config import MimiConfig
from ftrain.modules.hf_names import HfTensor, Names
from ftrain.modules.layers import attention_block, mlp_block, residual_layer
from ftrain.modules.spec import Constant, ParamSpec, Tree, fan_in, leaves_with_paths, ones

SEMANTIC, ACOUSTIC = "semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer"


def specs(cfg: MimiConfig) -> dict[str, Any]:
    """`encoder`, `encoder_transformer`, `downsample`, `quantizer` (its projections), `upsample`, `decoder_transformer`,
    `decoder`.

    >>> from ftrain.modules import spec
    >>> from ftrain.modules.families.mimi_config import config
    >>> spec.count(specs(config({})))
    79308609
    """
    d, kernel = cfg.convs.d_out, 2 * cfg.stride
    layers = [_layer(cfg).specs(1.0) for _ in range(cfg.layers)]
    tree = {
        "encoder": seanet.encoder_specs(cfg.convs),
        "encoder_transformer": {"layers": layers},
        "downsample": seanet.conv_specs(d, d, kernel, bias=False),
        "upsample": seanet.conv_specs(d, d, kernel, bias=False, up=True, groups=cfg.groups),
        "decoder_transformer": {"layers": layers},
        "decoder": seanet.decoder_specs(cfg.convs),
    }
    if cfg.d_code != d:
        into, out = _projection(d, cfg.d_code), _projection(cfg.d_code, d)
        tree["quantizer"] = {name: {"input_proj": into, "output_proj": out} for name in (SEMANTIC, ACOUSTIC)}
    return tree


def _projection(into: int, out: int) -> Tree:
    return {"weight": ParamSpec((out, into, 1), ("conv_out", "conv_in", "conv_kernel"), fan_in(into))}


def state_specs(cfg: MimiConfig) -> dict[str, Any]:
    """Both quantizers' codebooks (`ftrain.modules.codebook_averages`), which no gradient reaches."""
    levels = {SEMANTIC: cfg.semantic, ACOUSTIC: cfg.levels - cfg.semantic}
    return {name: _state(n, cfg) for name, n in levels.items()}


def _state(levels: int, cfg: MimiConfig) -> dict[str, ParamSpec]:
    """With `initialized_Q1`, ones, which files of the family have beside the averages."""
    averages = codebook_averages.state_specs(levels, cfg.codes, cfg.d_code)
    return {**averages, "initialized_Q1": ParamSpec((levels, 1), (None, None), ones())}


def _layer(cfg: MimiConfig) -> Block:
    return residual_layer(
        cfg.convs.d_out,
        attention=_scaled(attention_block(cfg.attention), cfg),
        mlp=_scaled(mlp_block(cfg.mlp), cfg),
        eps=cfg.eps,
        kind="layer",
    )


def _scaled(block: Block, cfg: MimiConfig) -> Block:
    """The block times a learned number for each channel, `scale_D` (Touvron et al. 2021)."""
    scale = ParamSpec((cfg.convs.d_out,), ("embed",), Constant(cfg.scale))

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        scaled: Tensor = params["scale_D"] * block.apply(params, x_TD, at)
        return scaled

    return Block(lambda out_gain: {**block.specs(out_gain), "scale_D": scale}, apply)


def recordings(waves: Sequence[np.ndarray], *, rate: int, cfg: MimiConfig) -> dict[str, Tensor]:
    """A batch of waves `[S]`, or `[C, S]`: `audio` float32 `[B, C, S]`, silence behind the short ones, and `samples`
    int64 `[B]`, how many of each count.

    ValueError for none, for one that is empty, of another rate or number of channels, of whole numbers, or not finite.

    >>> from ftrain.modules.families.mimi_config import config
    >>> recordings([np.zeros(3), np.zeros(5)], rate=24_000, cfg=config({}))["samples"].tolist()
    [3, 5]
    """
    if rate != cfg.rate:
        raise ValueError(f"recordings of {rate} samples a second: the codec takes {cfg.rate}; resample them")
    if not waves:
        raise ValueError("there are no recordings: give one at least")
    channels = [np.atleast_2d(wave) for wave in waves]
    for i, wave_CS in enumerate(channels):
        if wave_CS.ndim != 2 or len(wave_CS) != cfg.convs.channels or not wave_CS.size:
            raise ValueError(
                f"recording {i} is {list(waves[i].shape)}: the codec takes {cfg.convs.channels} channels [C, S], S > 0"
            )
        if not np.issubdtype(wave_CS.dtype, np.floating):
            raise ValueError(f"recording {i} is of {wave_CS.dtype}: give numbers in [-1, 1]; divide by the largest")
        if not np.isfinite(wave_CS).all():
            raise ValueError(f"recording {i} has numbers that are not finite: leave it out, or mend it")
    samples_B = torch.tensor([wave_CS.shape[1] for wave_CS in channels])
    audio_BCS = torch.zeros(len(channels), cfg.convs.channels, int(samples_B.max()))
    for own_CS, wave_CS in zip(audio_BCS, channels, strict=True):
        own_CS[:, : wave_CS.shape[1]] = torch.from_numpy(np.ascontiguousarray(wave_CS, np.float32))
    return {"audio": audio_BCS, "samples": samples_B}


def latents(params: Tree, audio_BCS: Tensor, cfg: MimiConfig) -> Tensor:
    """Samples in [-1, 1], floating `[B, C, S]`, to latents `[B, D, F]`, one for each begun `cfg.frame` of samples.

    ValueError for samples of another shape, whole numbers, and none at all.
    """
    if audio_BCS.dim() != 3 or audio_BCS.shape[1] != cfg.convs.channels or not audio_BCS.shape[2]:
        raise ValueError(f"audio {list(audio_BCS.shape)}: the codec takes samples [B, {cfg.convs.channels}, S], S > 0")
    if not audio_BCS.is_floating_point():
        raise ValueError(f"audio is {audio_BCS.dtype}: the codec takes numbers in [-1, 1]; divide by the largest")
    x_BDL = seanet.encode(params["encoder"], audio_BCS.to(_dtype(params)), cfg.convs)
    x_BDL = _transformed(params["encoder_transformer"], x_BDL, cfg)
    return seanet.conv(params["downsample"], x_BDL, stride=cfg.stride, padding="replicate")


def _dtype(params: Tree) -> torch.dtype:
    found: torch.dtype = params["downsample"]["conv"]["weight"].dtype
    return found


def _transformed(params: Tree, x_BDL: Tensor, cfg: MimiConfig) -> Tensor:
    rows, length = len(x_BDL), x_BDL.shape[-1]
    place_L = torch.arange(length, device=x_BDL.device)
    ids_T = torch.arange(rows, device=x_BDL.device).repeat_interleave(length)
    at, layer, x_TD = WholeItems(place_L.repeat(rows), segments_T=ids_T), _layer(cfg), x_BDL.mT.flatten(0, 1)
    at.rope(cfg.attention)  # before the layers, of which it is no part
    for i, own in enumerate(params["layers"]):
        x_TD = at.run_layer(layer, own, x_TD, layer=i)
    return x_TD.unflatten(0, (rows, length)).mT


def quantize(
    params: Tree, state: Tree, latents_BDF: Tensor, cfg: MimiConfig, *, levels: int | None = None
) -> dict[str, tuple[Tensor, Quantized]]:
    """By quantizer, the semantic one first: the rows `[B * F, Z]` that it quantizes, and what it makes of them.

    `levels`: codes of each frame, None for all; with only the semantic ones the acoustic quantizer is left out.
    ValueError for levels that there are not.
    """
    levels = cfg.levels if levels is None else levels
    if not cfg.semantic <= levels <= cfg.levels:
        raise ValueError(f"levels={levels}: the codec has {cfg.levels}, of which {cfg.semantic} go together")
    found = dict[str, tuple[Tensor, Quantized]]()
    for name, own in ((SEMANTIC, cfg.semantic), (ACOUSTIC, levels - cfg.semantic)):
        if own:
            rows_RZ = _projected(params, name, "input_proj", latents_BDF).mT.flatten(0, 1)
            found[name] = rows_RZ, codebook.quantize(rows_RZ, codebook_averages.books(state[name]), levels=own)
    return found


def _projected(params: Tree, quantizer: str, name: str, x_BDF: Tensor) -> Tensor:
    if "quantizer" not in params:
        return x_BDF
    return nnf.conv1d(x_BDF, params["quantizer"][quantizer][name]["weight"])


def encode(params: Tree, state: Tree, audio_BCS: Tensor, cfg: MimiConfig, *, levels: int | None = None) -> Tensor:
    """Samples `[B, C, S]` to codes `[B, Q, F]` int64; no gradient. `levels` and errors as of `quantize`, `latents`.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> from ftrain.modules.families.mimi_config import config
    >>> small = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    >>> code = {"codebook_dim": 4, "vector_quantization_hidden_dimension": 4, "upsample_groups": 8, "num_filters": 2}
    >>> cfg = config({**small, **code})
    >>> params, state = spec.init(specs(cfg), random.key(0)), spec.init(state_specs(cfg), random.key(1))
    >>> codes_BQF = encode(params, state, torch.zeros(1, 1, 2000), cfg)
    >>> list(codes_BQF.shape), list(decode(params, state, codes_BQF, cfg).shape)
    ([1, 32, 2], [1, 1, 3840])
    """
    with torch.no_grad():
        found = quantize(params, state, latents(params, audio_BCS, cfg), cfg, levels=levels)
        codes_QR = torch.cat([one.codes_QR for _, one in found.values()])
        return codes_QR.unflatten(1, (len(audio_BCS), -1)).transpose(0, 1)


def decode(params: Tree, state: Tree, codes_BQF: Tensor, cfg: MimiConfig) -> Tensor:
    """Codes `[B, Q, F]` of the first Q levels to samples `[B, C, F * cfg.frame]`, differentiable in the parameters.

    ValueError for codes of another shape or kind, and for a code beyond the codebook.
    """
    rows, levels, _ = codes_BQF.shape if codes_BQF.dim() == 3 else (0, 0, 0)
    if not cfg.semantic <= levels <= cfg.levels or codes_BQF.dtype != torch.int64:
        raise ValueError(
            f"codes {list(codes_BQF.shape)} of {codes_BQF.dtype}: the codec takes int64 [B, Q, F] of "
            f"{cfg.semantic} to {cfg.levels} levels"
        )
    codes_QR = codes_BQF.transpose(0, 1).flatten(1)
    parts = {SEMANTIC: codes_QR[: cfg.semantic], ACOUSTIC: codes_QR[cfg.semantic :]}
    dtype = _dtype(params)
    rows_RZ = {
        name: codebook.named(codes, codebook_averages.books(state[name]).to(dtype))
        for name, codes in parts.items()
        if len(codes)
    }
    return decode_rows(params, rows_RZ, cfg, recordings=rows)


def decode_rows(params: Tree, rows_RZ: dict[str, Tensor], cfg: MimiConfig, *, recordings: int) -> Tensor:
    """Quantized rows `[B * F, Z]` by quantizer, of so many recordings, to samples `[B, C, F * cfg.frame]`."""
    frames = [
        _projected(params, name, "output_proj", x.unflatten(0, (recordings, -1)).mT) for name, x in rows_RZ.items()
    ]
    x_BDF = torch.stack(frames).sum(0)
    x_BDL = seanet.conv_up(params["upsample"], x_BDF, stride=cfg.stride, groups=cfg.groups, trim=cfg.convs.trim)
    return seanet.decode(params["decoder"], _transformed(params["decoder_transformer"], x_BDL, cfg), cfg.convs)


_LAYER = (
    ("input_layernorm.weight", "attention_norm.weight_D"), ("input_layernorm.bias", "attention_norm.bias_D"),
    *((f"self_attn.{x}_proj.weight", f"attention.w_{x}_{dims}") for x, dims in (
        ("q", "DHK"), ("k", "DGK"), ("v", "DGK"), ("o", "HKD"),
    )),
    ("self_attn_layer_scale.scale", "attention.scale_D"),
    ("post_attention_layernorm.weight", "mlp_norm.weight_D"), ("post_attention_layernorm.bias", "mlp_norm.bias_D"),
    ("mlp.fc1.weight", "mlp.w_up_DF"), ("mlp.fc2.weight", "mlp.w_down_FD"), ("mlp_layer_scale.scale", "mlp.scale_D"),
)  # fmt: skip
_BIASES = tuple(
    (f"self_attn.{x}_proj.bias", f"attention.b_{x}_{dims}")
    for x, dims in (("q", "HK"), ("k", "GK"), ("v", "GK"), ("o", "D"))
)
_BOOK = (("cluster_usage", "cluster_usage_QK"), ("embed_sum", "embed_sum_QKZ"), ("initialized", "initialized_Q1"))


def names(cfg: MimiConfig) -> Names:
    """The tensors of `MimiModel` on disk; those of the state lie at `state`."""

    def found() -> Iterator[HfTensor]:
        for path, _ in leaves_with_paths(specs(cfg)):
            if "_transformer." not in path:
                yield HfTensor(path, path)
        for half in ("encoder_transformer", "decoder_transformer"):
            for i in range(cfg.layers):
                table = (*_LAYER, *(_BIASES if cfg.attention.bias else ()))
                yield from tensors(f"{half}.layers.{i}", f"{half}.layers.{i}", table)
        for name, own in state_specs(cfg).items():
            for level in range(own["initialized_Q1"].shape[0]):
                for theirs, leaf in _BOOK:
                    there = f"quantizer.{name}.layers.{level}.codebook.{theirs}"
                    yield HfTensor(there, f"state.{name}.{leaf}", index=level)

    return tuple(found())
