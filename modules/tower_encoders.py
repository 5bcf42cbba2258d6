"""Towers of published families as encoders of an omni model: pictures of any size, and sound in Whisper's windows.

`ftrain.modules.vision_tower` (Qwen2-VL's, Qwen2.5-VL's and Qwen2.5-Omni's) and `ftrain.modules.audio_tower` (Whisper's)
keep the layout of their folders, under `tower`; a projector of two linear maps, `projector`, takes their rows to the
width of the foundation, which need not be the one that they were made for.

Legend: H rows, W columns, C channels and S frames of a picture or film, N patches, n tokens of an item, D width of the
foundation, F mel frames, M mel bands, R rows of a window of sound, K windows.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.documents import Documents, ids_of
from ftrain.modules import audio_tower, linear, vision_tower
from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.log_mel import log_mel, require_wave
from ftrain.modules.omni import Encoder, Row
from ftrain.modules.packing import Media
from ftrain.modules.patch_grid import frame
from ftrain.modules.spec import Tree
from ftrain.modules.vision_tower import TowerConfig

RATE, WINDOW, HOP = 16_000, 400, 160
"""Of Whisper's log-mel frames: samples a second, samples of a spectrum, and samples from one to the next."""


def _projector(d_in: int, d_out: int) -> Tree:
    return {
        "up": linear.specs(d_in, d_out, ("embed", "mlp"), bias=True),
        "down": linear.specs(d_out, d_out, ("mlp", "embed"), bias=True),
    }


def _projected(params: Any, rows: Tensor) -> Tensor:
    return linear.apply(params["down"], F.gelu(linear.apply(params["up"], rows)))


def seeing(cfg: TowerConfig, d_model: int, *, begin: int, end: int) -> Encoder:
    """A tower of pictures for a foundation `d_model` wide; `begin`, `end`: ids of the tokens around a picture.

    Its features are those that `seen` makes. ValueError for a tower with `deep_layers` (the foundation's own layers
    would have to read them), or with a learned table of places.
    """
    if cfg.deep_layers or cfg.side is not None:
        raise ValueError(
            f"a tower with deep_layers={cfg.deep_layers} and side={cfg.side} cannot be an encoder of an omni model: "
            "take one of Qwen2-VL, Qwen2.5-VL or Qwen2.5-Omni, whose rows are all that is read"
        )
    return Encoder(
        specs={"tower": vision_tower.specs(cfg), "projector": _projector(cfg.d_out, d_model)},
        lm_encode=lambda params, features: _see(params, features, cfg),
        features={
            "pixels_NC": Row((cfg.d_patch,), "float32"),
            "places_N2": Row((2,), "int64"),
            "frame_N": Row((), "int64"),
            "window_N": Row((), "int64"),
        },
        rows_per_token=cfg.merge**2,
        begin=begin,
        end=end,
    )


def seen(modality: str, image: np.ndarray, cfg: TowerConfig) -> Media:
    """A picture `[H, W, C]` or a film `[S, H, W, C]`, as numbers that the tower shall see, for the encoder `modality`.

    A picture is read as `cfg.frames` equal frames; so many frames of a film become one frame of patches, which attends
    to itself. Tokens are read frame by frame and row by row. ValueError for sides that are not whole tokens, frames
    that are not whole groups, and whole numbers, whose range is nobody's to guess.

    >>> cfg = TowerConfig(16, layers=1, heads=2, d_hidden=32, d_out=24, patch=2, channels=1, window=1)
    >>> item = seen("image", np.zeros((4, 8, 1)), cfg)
    >>> item.features["pixels_NC"].shape, item.order.tolist()
    ((8, 8), [0, 1])
    """
    film_SHWC = np.asarray(image)
    if film_SHWC.dtype.kind != "f":
        raise ValueError(
            f"a picture of {film_SHWC.dtype}: give floating numbers in the range that the tower is fed with"
        )
    film_SHWC = film_SHWC.astype(np.float32)
    if film_SHWC.ndim == 3:
        film_SHWC = np.repeat(film_SHWC[None], cfg.frames, 0)
    token = cfg.patch * cfg.merge
    frames, height, width, channels = film_SHWC.shape if film_SHWC.ndim == 4 else (0, 0, 0, 0)
    if channels != cfg.channels or not frames * height * width or frames % cfg.frames or height % token + width % token:
        raise ValueError(
            f"a picture or film {list(np.shape(image))}: the tower takes [H, W, {cfg.channels}], or [S, H, W, "
            f"{cfg.channels}] with S a multiple of {cfg.frames}, with H and W multiples of {token}: resize it"
        )
    times, rows, columns = frames // cfg.frames, height // token, width // token
    blocks = film_SHWC.reshape(times, cfg.frames, rows, cfg.merge, cfg.patch, columns, cfg.merge, cfg.patch, channels)
    pixels_SnC = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(times, rows * columns, cfg.merge**2 * cfg.d_patch)
    grid = frame(height // cfg.patch, width // cfg.patch, cfg.grid)
    windows = int(grid.window_N.max()) + 1
    features = {
        "pixels_NC": pixels_SnC[:, grid.order_n].reshape(-1, cfg.d_patch),
        "places_N2": np.tile(grid.places_N2, (times, 1)),
        "frame_N": np.repeat(np.arange(times) + 1, len(grid.window_N)),
        "window_N": (grid.window_N + 1 + windows * np.arange(times)[:, None]).ravel(),
    }
    order_n = grid.order_n + len(grid.order_n) * np.arange(times)[:, None]
    return Media(modality, features, order_n.ravel())


def _see(params: Any, features: Mapping[str, Any], cfg: TowerConfig) -> Tensor:
    """Packed features to tokens `[n, D]`, in the order in which the tower reads them."""
    patches, square = features["pixels_NC"].shape[0], cfg.merge**2
    media = {
        "pixels": features["pixels_NC"],
        "places": features["places_N2"],
        "frames": _within(features, "frame_N", most=patches // square, longest=patches),
    }
    if cfg.window is not None:
        longest = (cfg.window * cfg.merge) ** 2
        media["windows"] = _within(features, "window_N", most=patches // square, longest=longest)
    return _projected(params["projector"], vision_tower.apply(params["tower"], media, cfg).rows_nV)


def _within(features: Mapping[str, Any], name: str, *, most: int, longest: int) -> Documents:
    """The parts of items that a feature numbers from 1, of `longest` rows; at most `most` of them.

    Rows of padding, which it numbers 0, are parts of at most as many rows.
    """
    items_N, numbers_N = ids_of(features["segments_N"]), features[name]
    rows_N = torch.arange(len(numbers_N), device=numbers_N.device)
    pieces_N = torch.where(numbers_N == 0, rows_N // longest, 0)
    new_N = torch.zeros_like(rows_N, dtype=torch.bool)
    for ids_N in (items_N, numbers_N, pieces_N):
        new_N[1:] |= ids_N[1:] != ids_N[:-1]
    index_N = new_N.cumsum(0)
    # twice: padding is cut where an item of it begins, and where a piece of it does
    starts = torch.arange(2 * most + 1, device=index_N.device)
    return Documents(index_N, torch.searchsorted(index_N, starts).to(torch.int32), longest)


def hearing(cfg: AudioTowerConfig, d_model: int, *, merge: int, begin: int, end: int) -> Encoder:
    """Whisper's encoder for a foundation `d_model` wide: `merge` neighbouring rows of a window become a token.

    Its feature is what `heard` makes. ValueError for a tower whose rows attend beyond a window or have a width of
    another decoder, and where tokens would lie in two windows.
    """
    _require_windows(cfg, merge)
    return Encoder(
        specs={"tower": audio_tower.specs(cfg), "projector": _projector(merge * cfg.d_model, d_model)},
        lm_encode=lambda params, features: _hear(params, features["mel_FM"], cfg, merge),
        features={"mel_FM": Row((cfg.mels,), "float32")},
        rows_per_token=cfg.chunk * merge // cfg.rows,
        begin=begin,
        end=end,
    )


def _require_windows(cfg: AudioTowerConfig, merge: int) -> None:
    if cfg.window != 1 or cfg.paired or cfg.d_out is not None or cfg.chunk != 2 * cfg.rows:
        raise ValueError(
            "a tower of sound that is an encoder of an omni model has windows of its own, rows that are not paired, "
            f"half as many as frames, and no d_out, as Whisper's; this one is {cfg}"
        )
    if merge < 1 or cfg.rows % merge:
        raise ValueError(f"merge={merge} does not divide the {cfg.rows} rows of a window: give one that does")


def heard(modality: str, wave_S: np.ndarray, cfg: AudioTowerConfig, *, merge: int) -> Media:
    """A wave `[S]` in [-1, 1], of `RATE` samples a second, for the encoder `modality`.

    It is cut into windows of `cfg.chunk` frames, the last filled up with silence, and each is heard by itself, silence
    and all, as Whisper does; tokens of silence behind it are not read. ValueError for several channels, numbers that
    are whole or not finite, an empty wave, and as `hearing`.

    >>> cfg = AudioTowerConfig(16, layers=1, heads=2, d_hidden=32, chunk=100, mels=40, table=True)
    >>> item = heard("audio", np.zeros(9600), cfg, merge=10)
    >>> item.features["mel_FM"].shape, item.order.tolist()
    ((100, 40), [0, 1, 2, -1, -1])
    """
    _require_windows(cfg, merge)
    wave_S = np.asarray(wave_S)
    require_wave(wave_S, rate=RATE, wanted=RATE)
    if not wave_S.size:
        raise ValueError("a wave of no samples: leave the recording out")
    samples = cfg.chunk * HOP
    filled_KS = np.pad(wave_S.astype(np.float64), (0, -len(wave_S) % samples)).reshape(-1, samples)
    mels = [log_mel(torch.from_numpy(own), rate=RATE, n_fft=WINDOW, hop=HOP, mels=cfg.mels) for own in filled_KS]
    places = np.arange(len(mels) * cfg.rows // merge)
    read = -(-len(wave_S) // (samples * merge // cfg.rows))
    return Media(modality, {"mel_FM": torch.cat(mels).float().numpy()}, np.where(places < read, places, -1))


def _hear(params: Any, mel_FM: Tensor, cfg: AudioTowerConfig, merge: int) -> Tensor:
    """Packed frames to tokens `[n, D]`."""
    mel_KMR = mel_FM.unflatten(0, (-1, cfg.chunk)).mT
    windows = torch.arange(mel_KMR.shape[0] + 1, device=mel_FM.device)
    sound = {
        "mel": mel_KMR,
        "heard": torch.full_like(windows[1:], cfg.chunk),
        "parts": Documents(windows[:-1].repeat_interleave(cfg.rows), (windows * cfg.rows).to(torch.int32), cfg.rows),
    }
    rows_nD = audio_tower.apply(params["tower"], sound, cfg).unflatten(0, (-1, merge)).flatten(1)
    return _projected(params["projector"], rows_nD)
