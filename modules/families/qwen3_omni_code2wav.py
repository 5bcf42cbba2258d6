"""Qwen3-Omni's Code2Wav: from the codes of speech to a wave, in order of time and without what comes later.

The codes of a frame are averaged embeddings, read by a transformer with a window, stretched in time by convolutions,
and made a wave by a decoder of Snakes and convolutions. Source: Qwen team, Qwen3-Omni (arXiv 2509.17765).

Legend: B clips, T frames, Q codes of a frame, D width, C channels, S samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.embedding import embedding
from ftrain.modules import hf_rope, linear, norm
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Context
from ftrain.modules.families.family import tensors
from ftrain.modules.hf_fields import Config, number, require_understood, size
from ftrain.modules.hf_names import HfTensor, Names
from ftrain.modules.layers import attention_block, mlp_block, residual_layer
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.spec import Constant, Normal, ParamSpec, Tree
from ftrain.modules.wave_blocks import causal_conv, conv_specs, snake, snake_specs, stretch_specs, stretched

DILATIONS = (1, 3, 9)
"""Of the residual units of a block of the decoder."""
CHUNK, CONTEXT = 300, 25
"""Frames that are decoded at once, and those before them that are decoded again, as transformers has it."""
_NORM_EPS, _GAMMA, _TAPS = 1e-6, 1e-6, 7
_READ = (
    "attention_bias", "attention_dropout", "codebook_size", "decoder_dim", "hidden_act", "hidden_size",
    "intermediate_size", "layer_scale_initial_scale", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "num_quantizers", "rms_norm_eps", "sliding_window", "upsample_rates", "upsampling_ratios",
    "layer_types", "head_dim", *hf_rope.READ,
)  # fmt: skip
_ATTENTION = (("q_proj.weight", "w_q_DHK"), ("k_proj.weight", "w_k_DGK"), ("v_proj.weight", "w_v_DGK"),
              ("o_proj.weight", "w_o_HKD"))  # fmt: skip
_MLP = (("gate_proj.weight", "w_gate_DF"), ("up_proj.weight", "w_up_DF"), ("down_proj.weight", "w_down_FD"))


@dataclass(frozen=True)
class Code2WavConfig:
    """`layers` layers of `attention` and an MLP of `d_hidden` over frames of `groups` codes, of `codes` each; then each
    place stretched by the factors `first`, and by a decoder, `d_decoder` channels wide, by the factors `last`.

    ValueError where halving the channels at each of `last` leaves none.
    """

    attention: AttentionConfig
    layers: int
    d_hidden: int
    groups: int
    codes: int
    d_decoder: int
    first: tuple[int, ...] = (2, 2)
    last: tuple[int, ...] = (8, 5, 4, 3)
    scale: float = 0.01
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.d_decoder % 2 ** len(self.last):
            raise ValueError(f"d_decoder={self.d_decoder} channels cannot be halved {len(self.last)} times")

    @property
    def samples(self) -> int:
        """Samples of a frame."""
        return prod(self.first) * prod(self.last)

    @property
    def layer(self) -> Block:
        """The layer of the transformer, both of whose branches have a scale for each channel."""
        attention, mlp = attention_block(self.attention), mlp_block(MlpConfig(self.attention.d_model, self.d_hidden))
        return residual_layer(
            self.attention.d_model,
            attention=_scaled(attention, self.attention.d_model, self.scale),
            mlp=_scaled(mlp, self.attention.d_model, self.scale),
            eps=self.attention.norm_eps,
        )


def _scaled(block: Block, width: int, begin: float) -> Block:
    """The block with a scale for each channel of what it adds (Touvron et al. 2021)."""
    scale = ParamSpec((width,), ("embed",), Constant(begin))
    return Block(
        lambda out_gain: {**block.specs(out_gain), "scale_D": scale},
        lambda params, x_TD, at: block.apply(params, x_TD, at) * params["scale_D"],
    )


def specs(cfg: Code2WavConfig) -> Tree:
    """`table_VD` (the codes of all codebooks), `layers`, `norm`, `upsample`, and of the decoder `first`, `blocks`,
    `snake`, `last`.
    """
    d, gain = cfg.attention.d_model, (2 * cfg.layers) ** -0.5
    widths = [cfg.d_decoder // 2**i for i in range(len(cfg.last) + 1)]
    return {
        "table_VD": ParamSpec((cfg.codes * cfg.groups, d), ("vocab", "embed"), Normal(cfg.init_std)),
        "layers": [cfg.layer.specs(gain) for _ in range(cfg.layers)],
        "norm": norm.specs(d),
        "upsample": [{"stretch": stretch_specs(d, d, factor), "mix": _mix_specs(d)} for factor in cfg.first],
        "first": conv_specs(d, cfg.d_decoder, _TAPS),
        "blocks": [_block_specs(*sizes) for sizes in zip(widths, widths[1:], cfg.last, strict=False)],
        "snake": snake_specs(widths[-1]),
        "last": conv_specs(widths[-1], 1, _TAPS),
    }


def _mix_specs(d: int) -> Tree:
    return {
        "conv": conv_specs(d, d, _TAPS, groups=d),
        "norm": norm.specs(d, kind="layer"),
        "up": linear.specs(d, 4 * d, ("embed", "mlp"), bias=True),
        "down": linear.specs(4 * d, d, ("mlp", "embed"), bias=True),
        "gamma_D": ParamSpec((d,), ("embed",), Constant(_GAMMA)),
    }


def _block_specs(into: int, out: int, factor: int) -> Tree:
    unit = {"snake1": snake_specs(out), "conv1": conv_specs(out, out, _TAPS), "snake2": snake_specs(out),
            "conv2": conv_specs(out, out, 1)}  # fmt: skip
    return {"snake": snake_specs(into), "stretch": stretch_specs(into, out, 2 * factor), "units": [unit] * 3}


def apply(params: Tree, codes_BTQ: Tensor, cfg: Code2WavConfig) -> Tensor:
    """Clips of frames of codes to waves in [-1, 1], `[B, S]`; a sample depends on no later frame.

    `codes_BTQ`: integers. S is a little less than `T * cfg.samples`, since each convolution that stretches leaves out
    what later frames would reach. ValueError where the codes are no integers, or of another number in a frame.
    """
    if codes_BTQ.dim() != 3 or codes_BTQ.shape[-1] != cfg.groups or codes_BTQ.is_floating_point():
        raise ValueError(
            f"codes {list(codes_BTQ.shape)} of {codes_BTQ.dtype}: give integers [clips, frames, {cfg.groups}], all "
            "codes of each frame"
        )
    clips, frames, groups = codes_BTQ.shape
    offset_Q = torch.arange(groups, device=codes_BTQ.device) * cfg.codes
    x_ND = embedding(codes_BTQ.flatten(0, 1) + offset_Q, params["table_VD"]).mean(1)
    place_N = torch.arange(frames, device=x_ND.device).repeat(clips)
    at = Context(place_N, segments_T=torch.arange(clips, device=x_ND.device).repeat_interleave(frames))
    for i, layer in enumerate(params["layers"]):
        x_ND = at.run_layer(cfg.layer, layer, x_ND, layer=i)
    x_BCT = norm.apply(params["norm"], x_ND, eps=cfg.attention.norm_eps).unflatten(0, (clips, frames)).mT
    for own, factor in zip(params["upsample"], cfg.first, strict=True):
        x_BCT = _mixed(own["mix"], stretched(own["stretch"], x_BCT, factor))
    x_BCT = causal_conv(params["first"], x_BCT)
    for own, factor in zip(params["blocks"], cfg.last, strict=True):
        x_BCT = _block(own, x_BCT, factor)
    return causal_conv(params["last"], snake(params["snake"], x_BCT))[:, 0].clamp(-1, 1)


def _mixed(params: Tree, x_BCT: Tensor) -> Tensor:
    """A block of ConvNeXt (Liu et al. 2022): neighbours in time channel by channel, then channels place by place."""
    seen_BTC = causal_conv(params["conv"], x_BCT, groups=x_BCT.shape[1]).mT
    normed_BTC = norm.apply(params["norm"], seen_BTC, eps=_NORM_EPS)
    mixed_BTC = linear.apply(params["down"], F.gelu(linear.apply(params["up"], normed_BTC)))
    return x_BCT + (params["gamma_D"] * mixed_BTC).mT


def _block(params: Tree, x_BCT: Tensor, factor: int) -> Tensor:
    x_BCT = stretched(params["stretch"], snake(params["snake"], x_BCT), factor)
    for unit, dilation in zip(params["units"], DILATIONS, strict=True):
        near_BCT = causal_conv(unit["conv1"], snake(unit["snake1"], x_BCT), dilation=dilation)
        x_BCT = x_BCT + causal_conv(unit["conv2"], snake(unit["snake2"], near_BCT))
    return x_BCT


@torch.no_grad()
def decode(
    params: Tree, codes_TQ: Tensor, cfg: Code2WavConfig, *, chunk: int = CHUNK, context: int = CONTEXT
) -> Tensor:
    """The wave `[S]` of one clip, `chunk` frames at a time, each after `context` frames before it.

    ValueError as `apply`, for a code of no sound, for no frame, and for a chunk of none.
    """
    if not len(codes_TQ) or chunk < 1 or context < 0:
        raise ValueError(f"{len(codes_TQ)} frames in chunks of {chunk} after {context}: give some of both")
    if not codes_TQ.is_floating_point() and not 0 <= int(codes_TQ.min()) <= int(codes_TQ.max()) < cfg.codes:
        raise ValueError(
            f"codes from {int(codes_TQ.min())} to {int(codes_TQ.max())}: those of sound are 0 to {cfg.codes - 1}; "
            "leave out frames that are none, as those behind the end of speech"
        )
    waves = list[Tensor]()
    for begin in range(0, len(codes_TQ), chunk):
        before = min(begin, context)
        wave_S = apply(params, codes_TQ[None, begin - before : begin + chunk], cfg)[0]
        waves.append(wave_S[before * cfg.samples :])
    return torch.cat(waves)


def config(config: Config) -> Code2WavConfig:
    """The decoder that a `config.json` (or its `code2wav_config`) describes. ValueError names an entry that it cannot
    follow.
    """
    require_understood(config, _READ)
    if (config.get("hidden_act") or "silu") != "silu" or config.get("attention_bias"):
        raise ValueError(
            f"config.json: hidden_act={config.get('hidden_act')!r}, attention_bias={config.get('attention_bias')!r}; "
            "Code2Wav computes 'silu' and has no biases in attention here"
        )
    d, heads = size(config, "hidden_size", 1024), size(config, "num_attention_heads", 16)
    base, scaling = hf_rope.rope_of(config, default_base=10_000.0)
    attention = AttentionConfig(
        d,
        heads=heads,
        kv_heads=size(config, "num_key_value_heads", 16),
        head_dim=size(config, "head_dim", d // heads),
        norm_eps=number(config, "rms_norm_eps", 1e-5),
        window=size(config, "sliding_window", 72),
        rope_base=base,
        rope_scaling=scaling,
    )
    return Code2WavConfig(
        attention,
        layers=size(config, "num_hidden_layers", 8),
        d_hidden=size(config, "intermediate_size", 3072),
        groups=size(config, "num_quantizers", 16),
        codes=size(config, "codebook_size", 2048),
        d_decoder=size(config, "decoder_dim", 1536),
        first=_factors(config, "upsampling_ratios", (2, 2)),
        last=_factors(config, "upsample_rates", (8, 5, 4, 3)),
        scale=number(config, "layer_scale_initial_scale", 0.01),
        init_std=number(config, "initializer_range", 0.02),
    )


def _factors(config: Config, name: str, usual: tuple[int, ...]) -> tuple[int, ...]:
    found = config.get(name, usual)
    if not isinstance(found, list | tuple) or not found or not all(type(n) is int and n > 0 for n in found):
        raise ValueError(f"config.json: {name}={found!r} must be whole numbers of at least 1")
    return tuple(found)


def names(cfg: Code2WavConfig, *, prefix: str = "") -> Names:
    """The tensors, called `prefix` and something."""
    return tuple(HfTensor(prefix + n.name, n.leaf, transposed=n.transposed) for n in _names(cfg))


def _names(cfg: Code2WavConfig) -> Iterator[HfTensor]:
    for i in range(cfg.layers):
        there, here = f"pre_transformer.layers.{i}", f"layers.{i}"
        yield from tensors(f"{there}.self_attn", f"{here}.attention", _ATTENTION)
        yield from tensors(f"{there}.mlp", f"{here}.mlp", _MLP)
        yield HfTensor(f"{there}.input_layernorm.weight", f"{here}.attention_norm.weight_D")
        yield HfTensor(f"{there}.post_attention_layernorm.weight", f"{here}.mlp_norm.weight_D")
        yield HfTensor(f"{there}.self_attn_layer_scale.scale", f"{here}.attention.scale_D")
        yield HfTensor(f"{there}.mlp_layer_scale.scale", f"{here}.mlp.scale_D")
    yield HfTensor("pre_transformer.norm.weight", "norm.weight_D")
    yield HfTensor("code_embedding.weight", "table_VD")
    for i in range(len(cfg.first)):
        yield from _conv(f"upsample.{i}.0", f"upsample.{i}.stretch")
        there, here = f"upsample.{i}.1", f"upsample.{i}.mix"
        yield HfTensor(f"{there}.gamma", f"{here}.gamma_D")
        yield from _conv(f"{there}.dwconv", f"{here}.conv")
        yield from (HfTensor(f"{there}.norm.{kind}", f"{here}.norm.{kind}_D") for kind in ("weight", "bias"))
        for name, own in (("pwconv1", "up"), ("pwconv2", "down")):
            yield HfTensor(f"{there}.{name}.weight", f"{here}.{own}.w", transposed=True)
            yield HfTensor(f"{there}.{name}.bias", f"{here}.{own}.b")
    yield from _conv("decoder.0", "first")
    for i in range(len(cfg.last)):
        there, here = f"decoder.{i + 1}.block", f"blocks.{i}"
        yield from _snake(f"{there}.0", f"{here}.snake")
        yield from _conv(f"{there}.1", f"{here}.stretch")
        for k in range(len(DILATIONS)):
            for j in (1, 2):
                yield from _snake(f"{there}.{k + 2}.act{j}", f"{here}.units.{k}.snake{j}")
                yield from _conv(f"{there}.{k + 2}.conv{j}", f"{here}.units.{k}.conv{j}")
    yield from _snake(f"decoder.{len(cfg.last) + 1}", "snake")
    yield from _conv(f"decoder.{len(cfg.last) + 2}", "last")


def _conv(there: str, here: str) -> Iterator[HfTensor]:
    return (HfTensor(f"{there}.conv.{kind}", f"{here}.{kind}") for kind in ("weight", "bias"))


def _snake(there: str, here: str) -> Iterator[HfTensor]:
    return (HfTensor(f"{there}.{name}", f"{here}.{name}_C") for name in ("alpha", "beta"))
