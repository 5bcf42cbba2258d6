"""What a `config.json` of Mimi says: the sizes of the codec."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from ftrain.modules import hf_rope
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.hf_fields import Config, flag, number, require_understood, size
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.seanet import Padding, SeanetConfig

_MOST = 4096
_KINDS: dict[str, Literal["gelu", "gelu_tanh", "quick_gelu"]] = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu",
}  # fmt: skip
_READ = (
    "attention_bias", "attention_dropout", "audio_channels", "codebook_dim", "codebook_size", "compress",
    "decoder_config", "dilation_growth_rate", "encoder_config", "frame_rate", "head_dim", "hidden_act", "hidden_size",
    "intermediate_size", "kernel_size", "last_kernel_size", "layer_scale_initial_scale", "norm_eps",
    "num_attention_heads", "num_filters", "num_hidden_layers", "num_key_value_heads", "num_quantizers",
    "num_residual_layers", "num_semantic_quantizers", "pad_mode", "residual_kernel_size", "sampling_rate",
    "sliding_window", "tie_word_embeddings", "trim_right_ratio", "upsample_groups", "upsampling_ratios",
    "use_causal_conv", "use_conv_shortcut", "use_streaming", "vector_quantization_hidden_dimension", *hf_rope.READ,
    "normalize", "encodec_frame_rate",  # what files of the first transformers say too, and nobody reads
)  # fmt: skip


@dataclass(frozen=True)
class MimiConfig:
    """`rate`: samples a second. `convs`: between samples and the transformer's frames, of which `stride` become one
    frame of latents, made `stride` again in `groups` groups of channels.

    `layers`, `attention`, `mlp`, `eps`, `scale` (at which the scale of a residual branch starts): of both transformers.
    `levels` of `codes` entries of width `d_code`, the first `semantic` of which are a quantizer of their own.

    ValueError where there is no level of either kind.
    """

    rate: int
    convs: SeanetConfig
    stride: int
    groups: int
    layers: int
    attention: AttentionConfig
    mlp: MlpConfig
    eps: float = 1e-5
    scale: float = 0.01
    levels: int = 32
    semantic: int = 1
    codes: int = 2048
    d_code: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.semantic < self.levels:
            raise ValueError(f"MimiConfig: of {self.levels} levels {self.semantic} are semantic; need both kinds")

    @property
    def frame(self) -> int:
        """Samples of a frame of latents."""
        return self.convs.hop * self.stride

    def frames(self, samples: Any) -> Any:
        """Frames of so many samples, a whole number or an int64 tensor of any shape."""
        return (samples + self.frame - 1) // self.frame


def config(config: Config) -> MimiConfig:
    """The codec that a `config.json` of transformers (`MimiModel`) describes. ValueError names an entry that it cannot
    follow.

    >>> made = config({})
    >>> made.rate / made.frame, made.levels
    (12.5, 32)
    """
    _refuse(config)
    d, heads = size(config, "hidden_size", 512), size(config, "num_attention_heads", 8)
    d_code, rate = size(config, "vector_quantization_hidden_dimension", 256), size(config, "sampling_rate", 24_000)
    if size(config, "codebook_dim", 256 if "codebook_dim" not in config else d) != d_code:
        raise ValueError(
            f"config.json: codebook_dim={config.get('codebook_dim')!r} is not "
            f"vector_quantization_hidden_dimension={d_code}, which its entries are compared with"
        )
    base, scaling = hf_rope.rope_of(config, default_base=10_000.0)
    bias = flag(config, "attention_bias")
    convs = _convs(config, d)
    return MimiConfig(
        rate,
        convs,
        _stride(config, rate, convs.hop),
        size(config, "upsample_groups", 512),
        _count(config, "num_hidden_layers", 8),
        AttentionConfig(
            d,
            heads=heads,
            kv_heads=size(config, "num_key_value_heads", 8),
            head_dim=size(config, "head_dim", d // heads),
            bias=bias,
            out_bias=bias,
            window=size(config, "sliding_window", 250),
            rope_base=base,
            rope_scaling=scaling,
        ),
        MlpConfig(d, size(config, "intermediate_size", 2048), kind=_KINDS[config.get("hidden_act") or "gelu"]),
        number(config, "norm_eps", 1e-5),
        number(config, "layer_scale_initial_scale", 0.01),
        _count(config, "num_quantizers", 32),
        size(config, "num_semantic_quantizers", 1),
        size(config, "codebook_size", 2048),
        d_code,
    )


def _refuse(config: Config) -> None:
    require_understood(config, _READ)
    wrong = {
        "use_causal_conv": config.get("use_causal_conv") is False,
        "pad_mode": config.get("pad_mode", "constant") not in ("constant", "replicate"),
        "hidden_act": (config.get("hidden_act") or "gelu") not in _KINDS,
        "attention_dropout": bool(config.get("attention_dropout")),
        "normalize": bool(config.get("normalize")),
        **{half: half in config and config[half] is None for half in ("encoder_config", "decoder_config")},
    }
    for field in (name for name, found in wrong.items() if found):
        raise ValueError(
            f"config.json: {field}={config[field]!r}, which our codec does not have: it is whole, causal, padded by "
            f"'constant' or 'replicate', without dropout, with hidden_act of {', '.join(_KINDS)}"
        )


def _count(config: Config, field: str, default: int) -> int:
    found = size(config, field, default)
    if found > _MOST:
        raise ValueError(f"config.json: {field}={found} is more than {_MOST}, which is taken for a mistake")
    return found


def _convs(config: Config, d: int) -> SeanetConfig:
    ratios = config.get("upsampling_ratios") or (8, 6, 5, 4)
    if not all(isinstance(x, int) and not isinstance(x, bool) and 0 < x <= _MOST for x in ratios) or len(ratios) > 16:
        raise ValueError(f"config.json: upsampling_ratios={ratios!r} must be a few whole numbers of at least 1")
    padding: Padding = config.get("pad_mode", "constant")
    return SeanetConfig(
        size(config, "audio_channels", 1),
        d,
        size(config, "num_filters", 64),
        tuple(ratios),
        _count(config, "num_residual_layers", 1),
        size(config, "kernel_size", 7),
        size(config, "last_kernel_size", 3),
        size(config, "residual_kernel_size", 3),
        size(config, "dilation_growth_rate", 2),
        size(config, "compress", 2),
        flag(config, "use_conv_shortcut"),
        padding,
        number(config, "trim_right_ratio", 1.0),
    )


def _stride(config: Config, rate: int, hop: int) -> int:
    """Frames of the transformer to one of latents, two where the file says nothing."""
    given = config.get("frame_rate") or config.get("_frame_rate")
    if given is None:
        return 2
    stride = int(math.ceil(rate / hop) / number({"frame_rate": given}, "frame_rate", 1.0))
    if stride < 2:
        raise ValueError(f"config.json: frame_rate={given} must be half of {rate / hop} frames a second, or less")
    return stride
