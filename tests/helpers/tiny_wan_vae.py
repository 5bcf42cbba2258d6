"""Tiny video autoencoders of Wan's: diffusers' own with random weights, and the same weights as our tree."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftrain.modules.families import wan_vae
from ftrain.modules.spec import map_with_paths

TINY: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 4, "latents_mean": [0.5] * 4, "latents_std": [2.0] * 4,
    "num_res_blocks": 1, "dim_mult": [1, 2, 2, 2],
}  # fmt: skip
RESIDUAL = {
    **TINY, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "decoder_base_dim": 8,
    "scale_factor_spatial": 16,
}  # fmt: skip
"""As Wan 2.2's 5B has it."""


def module(told: Mapping[str, Any]) -> Any:
    """diffusers' autoencoder, every parameter random, few outputs beyond 1."""
    import diffusers

    made = diffusers.AutoencoderKLWan.from_config(dict(told)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            spread = 0.3 if "gamma" in name else 1.5 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.1
            p.copy_(float("gamma" in name) + torch.randn(p.shape, generator=generator) * spread)
    return made


def tree_of(tensors: Mapping[str, Tensor], cfg: wan_vae.WanVaeConfig) -> Any:
    """Tensors by diffusers' names as our tree."""
    return map_with_paths(lambda path, _: tensors[path].detach().clone(), wan_vae.specs(cfg))


def video(frames: int = 9, *, videos: int = 1) -> Tensor:
    """Numbers in [-1, 1]."""
    return torch.rand(videos, 3, frames, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
