"""Tiny residual audio codecs: transformers' own with random weights and codebooks, and the same weights as our tree."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftrain.hf.load import load_hf
from ftrain.modules.families import mimi, mimi_config

TINY: dict[str, Any] = {
    "hidden_size": 16, "num_filters": 4, "upsampling_ratios": [3, 2], "codebook_size": 8, "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8, "num_quantizers": 4, "upsample_groups": 16, "num_hidden_layers": 2,
    "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 4,
    "sampling_rate": 1200, "layer_scale_initial_scale": 0.5,
}  # fmt: skip
OTHER = {
    **TINY, "audio_channels": 2, "num_residual_layers": 2, "use_conv_shortcut": True, "num_semantic_quantizers": 2,
    "pad_mode": "replicate", "trim_right_ratio": 0.5, "attention_bias": True, "num_key_value_heads": 1, "head_dim": 4,
    "vector_quantization_hidden_dimension": 16, "codebook_dim": 16, "upsample_groups": 4, "kernel_size": 5,
    "sliding_window": 250, "frame_rate": 50, "hidden_act": "gelu_pytorch_tanh", "compress": 1,
}  # fmt: skip
"""What published codecs do not use: two channels, shortcuts, biases, no projections, other paddings and strides."""


def module(told: Mapping[str, Any], *, seed: int = 0) -> Any:
    """transformers' codec, every parameter and every codebook random."""
    from transformers import MimiConfig, MimiModel

    made = MimiModel(MimiConfig(**told)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.2 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.5))
        for name, buffer in made.named_buffers():
            if name.endswith("embed_sum"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("cluster_usage"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return made


def ours(folder: Path, told: Mapping[str, Any]) -> tuple[mimi_config.MimiConfig, Any, Any]:
    """Of a folder the configuration, the parameters, and the state."""
    cfg = mimi_config.config(told)
    tree = load_hf(folder, {**mimi.specs(cfg), "state": mimi.state_specs(cfg)}, mimi.names(cfg))
    state = tree.pop("state")
    return cfg, tree, state


def audio(samples: int = 100, *, recordings: int = 2, channels: int = 1, seed: int = 1) -> Tensor:
    """Noise, `[B, C, S]`."""
    return torch.randn(recordings, channels, samples, generator=torch.Generator().manual_seed(seed)) * 0.3
