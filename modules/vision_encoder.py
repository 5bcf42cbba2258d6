"""A vision transformer over images and videos of any size, packed side by side (NaViT, Dehghani et al. 2023).

One implementation for both: a patch spans `frames` frames (1 for images) and `patch` x `patch` pixels, its position has
three coordinates (time, row, column) that enter as rotary angles, and attention stays within an item. Then each
`merge` x `merge` square of neighbours becomes one token (pixel shuffle and an MLP, as in Qwen2-VL, Wang et al. 2024).

Legend: N patches of the pack, P numbers in a patch, D encoder width, n tokens; of one item: S frames, H height, W
width, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ftrain.modules import encoder_stack, linear
from ftrain.modules.block import Block
from ftrain.modules.encoder_stack import StackConfig
from ftrain.modules.omni import Encoder, Row


@dataclass(frozen=True)
class VisionConfig:
    """`patch` pixels a side, `frames` frames deep, of `channels` channels; `merge` x `merge` patches give one token.

    The encoder is `d_model` wide with `layers` layers of `heads` heads; its tokens are `d_out` wide, the foundation's
    width. `d_hidden` 0 means four times `d_model`. `pattern`: layers of your own (see `StackConfig`).

    Raises:
        ValueError: `patch`, `channels`, `frames` or `merge` is below 1.
    """

    d_model: int
    layers: int
    heads: int
    d_out: int
    patch: int = 14
    channels: int = 3
    frames: int = 1
    merge: int = 2
    d_hidden: int = 0
    rope_base: float = 100.0
    pattern: tuple[Block | None, ...] = ()

    def __post_init__(self) -> None:
        for name in ("patch", "channels", "frames", "merge"):
            if getattr(self, name) < 1:
                raise ValueError(f"VisionConfig.{name}={getattr(self, name)} must be at least 1")

    @property
    def d_patch(self) -> int:
        """Numbers in one patch."""
        return self.frames * self.patch**2 * self.channels

    @property
    def rows_per_token(self) -> int:
        """Patches that become one token."""
        return self.merge**2

    @property
    def axes(self) -> int:
        """Position axes that matter: 2 for images, 3 for video."""
        return 2 if self.frames == 1 else 3

    @property
    def stack(self) -> StackConfig:
        """The transformer."""
        hidden = self.d_hidden or 4 * self.d_model
        return StackConfig(self.d_model, self.layers, self.heads, hidden, self.axes, self.rope_base, self.pattern)

    @property
    def d_merged(self) -> int:
        """Width of a merged square."""
        return self.rows_per_token * self.d_model


def patchify(image: np.ndarray, *, cfg: VisionConfig) -> dict[str, np.ndarray]:
    """One item's features: `patches_NP` float32 and `positions_N3` int64 (time, row, column, counted in patches).

    `image`: `[H, W, C]`, or a video `[S, H, W, C]`, any numeric dtype, values as the encoder shall see them. H and W
    are filled up with zeros to whole merged squares, S by repeating the last frame. Patches come square by square, so
    that the patches of one token are neighbours.

    ValueError for another shape, or an empty image.

    >>> cfg = VisionConfig(16, layers=1, heads=2, d_out=24, patch=4, channels=1)
    >>> features = patchify(np.zeros((8, 12, 1)), cfg=cfg)  # filled up to 8 x 16 pixels: two squares of 2 x 2 patches
    >>> features["patches_NP"].shape, features["positions_N3"][4].tolist()
    ((8, 16), [0, 0, 2])
    """
    video_SHWC = np.asarray(image, np.float32)
    if video_SHWC.ndim == 3:
        video_SHWC = video_SHWC[None]
    if video_SHWC.ndim != 4 or video_SHWC.shape[-1] != cfg.channels or 0 in video_SHWC.shape:
        raise ValueError(
            f"patchify takes [H, W, C] or [S, H, W, C], not empty, with C = {cfg.channels}; got {list(np.shape(image))}"
        )
    video_SHWC = _fill(video_SHWC, cfg)
    squares = [size // (cfg.patch * cfg.merge) for size in video_SHWC.shape[1:3]]
    times = video_SHWC.shape[0] // cfg.frames
    blocks = video_SHWC.reshape(
        times, cfg.frames, squares[0], cfg.merge, cfg.patch, squares[1], cfg.merge, cfg.patch, cfg.channels
    )
    patches_NP = blocks.transpose(0, 2, 5, 3, 6, 1, 4, 7, 8).reshape(-1, cfg.d_patch)
    return {"patches_NP": patches_NP, "positions_N3": _positions(times, squares[0], squares[1], cfg.merge)}


def _fill(video_SHWC: np.ndarray, cfg: VisionConfig) -> np.ndarray:
    """Whole temporal patches and whole merged squares."""
    frames, height, width, _ = video_SHWC.shape
    side = cfg.patch * cfg.merge
    if frames % cfg.frames:
        video_SHWC = np.pad(video_SHWC, ((0, -frames % cfg.frames), (0, 0), (0, 0), (0, 0)), mode="edge")
    if height % side or width % side:
        video_SHWC = np.pad(video_SHWC, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
    return video_SHWC


def _positions(times: int, rows: int, columns: int, merge: int) -> np.ndarray:
    """Coordinates of all patches, square by square: `[N, 3]`; `rows` and `columns` count squares."""
    grid = np.indices((times, rows, columns, merge, merge)).reshape(5, -1)
    return np.stack([grid[0], grid[1] * merge + grid[3], grid[2] * merge + grid[4]], axis=1)


def specs(cfg: VisionConfig) -> dict[str, Any]:
    """`patch` (linear), `stack`, and the projector: `merge` (linear over a merged square) and `out`."""
    return {
        "patch": linear.specs(cfg.d_patch, cfg.d_model, ("patch", "embed"), bias=True),
        "stack": encoder_stack.specs(cfg.stack),
        "merge": linear.specs(cfg.d_merged, cfg.d_merged, ("embed", "mlp"), bias=True),
        "out": linear.specs(cfg.d_merged, cfg.d_out, ("mlp", "embed"), bias=True),
    }


def lm_encode(params: Any, features: Mapping[str, Any], *, cfg: VisionConfig) -> Tensor:
    """Packed `patches_NP`, `positions_N3`, `segments_N` (an item's number, or `Documents`) to tokens
    `[N / merge**2, d_out]`.

    Computes in the dtype of the parameters. ValueError where N is no multiple of `merge**2`.

    >>> import torch
    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = VisionConfig(16, layers=1, heads=2, d_out=24, patch=4, channels=1)
    >>> item = {name: torch.from_numpy(x) for name, x in patchify(np.zeros((8, 16, 1)), cfg=cfg).items()}
    >>> features = {**item, "segments_N": torch.zeros(8, dtype=torch.int64)}
    >>> list(lm_encode(spec.init(specs(cfg), random.key(0)), features, cfg=cfg).shape)
    [2, 24]
    """
    patches_NP, positions_N3 = features["patches_NP"], features["positions_N3"]
    if patches_NP.shape[0] % cfg.rows_per_token:
        raise ValueError(f"{patches_NP.shape[0]} patches are not whole squares of {cfg.rows_per_token}")
    x_ND = linear.apply(params["patch"], patches_NP.to(params["patch"]["w"].dtype))
    positions_AN = positions_N3[:, 3 - cfg.axes :].T
    x_ND = encoder_stack.apply(
        params["stack"], x_ND, positions=positions_AN, segments_T=features["segments_N"], cfg=cfg.stack
    )
    merged_nD = F.gelu(linear.apply(params["merge"], x_ND.reshape(-1, cfg.d_merged)))
    return linear.apply(params["out"], merged_nD)


def encoder(cfg: VisionConfig, *, begin: int, end: int) -> Encoder:
    """The modality for `OmniModel`: images where `cfg.frames` is 1, else video; `begin`, `end` are token ids."""
    return Encoder(
        specs=specs(cfg),
        lm_encode=lambda params, features: lm_encode(params, features, cfg=cfg),
        features={"patches_NP": Row((cfg.d_patch,), "float32"), "positions_N3": Row((3,), "int64")},
        rows_per_token=cfg.rows_per_token,
        begin=begin,
        end=end,
    )
