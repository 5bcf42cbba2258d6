"""Wan's video autoencoder on overlapping tiles of a picture, for videos that are too large at once; seams are faded.

Tiles do not see each other, so that numbers differ from those of the whole near their edges, as in diffusers' tiling.

Legend: B videos, C channels, T frames, H and W rows and columns, Z channels of latents, F latent frames.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ftrain.modules.families import wan_vae
from ftrain.modules.families.wan_vae import WanVaeConfig
from ftrain.modules.spec import Tree


def encode_in_tiles(
    params: Tree,
    video_BCTHW: Tensor,
    cfg: WanVaeConfig,
    *,
    tile: int = 256,
    stride: int = 192,
    frames: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`wan_vae.encode` of squares of `tile` pixels, one every `stride`; `frames` as there.

    ValueError for a tile or a stride that is no multiple of `space_factor`, a stride beyond the tile, and as
    `wan_vae.encode`.
    """
    _check(tile, stride, cfg)

    def run(piece: Tensor) -> Tensor:
        return torch.cat(wan_vae.encode(params, piece, cfg, frames=frames), 1)

    side = cfg.space_factor
    mean, log_variance = _in_tiles(run, video_BCTHW, tile, stride, lambda n: n // side).chunk(2, 1)
    return mean, log_variance


def decode_in_tiles(
    params: Tree,
    latents_BZFHW: Tensor,
    cfg: WanVaeConfig,
    *,
    tile: int = 256,
    stride: int = 192,
    frames: int | None = None,
) -> Tensor:
    """`wan_vae.decode` to squares of `tile` pixels, one every `stride`; `frames` as there.

    ValueError for a tile or a stride that is no multiple of `space_factor`, a stride beyond the tile, and as
    `wan_vae.decode`.
    """
    _check(tile, stride, cfg)
    side = cfg.space_factor
    return _in_tiles(
        lambda piece: wan_vae.decode(params, piece, cfg, frames=frames),
        latents_BZFHW,
        tile // side,
        stride // side,
        lambda n: n * side,
    )


def _check(tile: int, stride: int, cfg: WanVaeConfig) -> None:
    side = cfg.space_factor
    if tile % side or stride % side or not 0 < stride <= tile:
        raise ValueError(
            f"tile={tile}, stride={stride}: both must be multiples of {side} pixels, and the stride no more than the "
            "tile"
        )


def _in_tiles(
    run: Callable[[Tensor], Tensor], x_BCTHW: Tensor, tile: int, stride: int, sized: Callable[[int], int]
) -> Tensor:
    """`run` on each tile, joined. `sized`: how many places of the result so many places are."""
    height, width = x_BCTHW.shape[3:]
    fade, step = sized(tile) - sized(stride), sized(stride)
    above: list[Tensor] = []
    joined = []
    for i in range(0, height, stride):
        row: list[Tensor] = []
        for number, j in enumerate(range(0, width, stride)):
            made = run(x_BCTHW[..., i : i + tile, j : j + tile])
            made = _faded(above[number], made, fade, 3) if above else made
            row.append(_faded(row[-1], made, fade, 4) if row else made)
        joined.append(torch.cat([made[..., :step, :step] for made in row], 4))
        above = row
    return torch.cat(joined, 3)[..., : sized(height), : sized(width)]


def _faded(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """`after`, whose first places along `dim` are more and more itself and less and less the end of `before`."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    if not extent:
        return after
    share = torch.arange(extent, device=after.device, dtype=after.dtype) / extent
    share = share.reshape([extent if d == dim else 1 for d in range(after.dim())])
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    begin, rest = after.narrow(dim, 0, extent), after.narrow(dim, extent, after.shape[dim] - extent)
    return torch.cat([end * (1 - share) + begin * share, rest], dim)
