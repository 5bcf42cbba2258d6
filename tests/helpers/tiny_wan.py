"""Tiny Wan transformers: diffusers' own, the same weights as our tree, clips, and batches of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftrain.modules.families import wan, wan_names
from ftrain.modules.families.wan_config import DIFFUSERS, WanConfig
from ftrain.modules.families.wan_latents import Clip
from ftrain.modules.spec import leaves_with_paths, map_with_paths

TINY: dict[str, Any] = {
    "_class_name": DIFFUSERS, "num_attention_heads": 2, "attention_head_dim": 20, "ffn_dim": 48, "num_layers": 2,
    "in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 16,
}  # fmt: skip
WITH_IMAGE = {**TINY, "in_channels": 9, "image_dim": 10, "added_kv_proj_dim": 40}
BOTH_ENDS = {**WITH_IMAGE, "pos_embed_seq_len": 6}
SIZES = ((2, 4, 6), (1, 6, 4), (3, 2, 2))
"""Latent frames, rows and columns of the clips."""


def module(told: Mapping[str, Any]) -> Any:
    """diffusers' transformer, every parameter random, so that gates are open."""
    import diffusers

    made = diffusers.WanTransformer3DModel.from_config(dict(told)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(float("norm" in name and "weight" in name) + torch.randn(p.shape, generator=generator) * 0.1)
    return made


def tree_of(tensors: Mapping[str, Tensor], cfg: WanConfig) -> Any:
    """Tensors by diffusers' names as our tree."""
    found = {n.leaf: tensors[n.name].mT if n.transposed else tensors[n.name] for n in wan_names.diffusers(cfg)}
    return map_with_paths(lambda path, _: found[path].detach().clone().contiguous(), wan.specs(cfg))


def clips(cfg: WanConfig, *, frame_times: bool = False) -> list[Clip]:
    """Clips of `SIZES` with texts of 3, 512 and 0 rows. `frame_times`: the first frame of each is clean."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    made = []
    for size, rows, time in zip(SIZES, (3, 512, 0), (0.5371, 0.021, 0.9991), strict=True):
        image = draw(cfg.image_places or 7, cfg.d_image) if cfg.d_image else None
        times = [0.0, *[time] * (size[0] - 1)] if frame_times else time
        given = draw(cfg.channels_in, *size), times, draw(rows, cfg.d_text), image, draw(cfg.channels_out, *size)
        made.append(Clip(*given))
    return made


def theirs(made: Any, clip: Clip) -> Tensor:
    """What diffusers predicts for one clip, `[C, F, H, W]`, by itself."""
    text = torch.cat([clip.text_SC, clip.text_SC.new_zeros(512 - len(clip.text_SC), clip.text_SC.shape[1])])
    image = None if clip.image_IC is None else clip.image_IC[None]
    if image is not None and made.config.pos_embed_seq_len:
        image = image.unflatten(1, (2, -1)).flatten(0, 1)  # the first and the last frame
    frames, h, w = clip.input_CFHW.shape[1:]
    times = torch.tensor(clip.time, dtype=torch.float64) * 1000
    if times.dim():
        times = times.repeat_interleave(h * w // 4)[None]
        assert times.shape[1] == frames * h * w // 4
    found = made(clip.input_CFHW[None], times.reshape(-1) if times.dim() == 0 else times, text[None], image)
    return found.sample[0]


def relative(found: Any, wanted: Any) -> dict[str, float]:
    """Each leaf's difference over its norm (at least a thousandth of the largest one's)."""
    want = dict(leaves_with_paths(wanted))
    largest = max(float(x.norm()) for x in want.values())
    return {
        path: float((x.double() - want[path].double()).norm()) / max(float(want[path].norm()), 1e-3 * largest)
        for path, x in leaves_with_paths(found)
    }
