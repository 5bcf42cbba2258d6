"""The pictures of a raw batch, checked: which frames there are, and which tokens stand for them.

Raw leaves are those that Qwen's processors make, pictures in the order in which they stand in the tokens. Numpy on the
host; a picture is an image or a video.

Legend: T tokens, P patches of all pictures of a kind, M tokens of a kind, F frames of a picture, n tokens of a frame.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ftrain.modules.mrope import After, Picture, Scene
from ftrain.modules.patch_grid import Frame, frame
from ftrain.modules.scenes import scene
from ftrain.modules.sounds import LEAVES as SOUND_LEAVES
from ftrain.modules.sounds import Clip, SoundConfig
from ftrain.modules.vision_tower import TowerConfig

KINDS = ("image", "video")
PIXELS: Mapping[str, str] = MappingProxyType({"image": "pixels", "video": "pixel_values_videos"})
"""The leaf of a kind's patches, `[P, numbers of a patch]`."""
ROWS: Mapping[str, str] = MappingProxyType({"image": "image_rows", "video": "video_rows"})
"""The leaf that stands for a kind's patches where the tower read them before: its rows, `[tokens, R, width]`, of tokens
in reading order, R one and as many as there are deep layers."""
GRIDS: Mapping[str, str] = MappingProxyType({"image": "image_grid_thw", "video": "video_grid_thw"})
"""The leaf of a kind's shapes: frames, rows and columns of patches, `[pictures, 3]`."""
SECONDS = "second_per_grid_ts"
"""The leaf of how long a frame of each video lasts, `[videos]`, where times are places."""
OTHER_SECONDS = "video_second_per_grid"
"""The same as processors of models that hear call it."""
TYPES = "mm_token_type_ids"
"""The leaf in which processors of transformers say once more what each token stands for: 1 an image, 2 a video."""
LEAVES = (*PIXELS.values(), *ROWS.values(), *GRIDS.values(), SECONDS, OTHER_SECONDS, TYPES, *SOUND_LEAVES)


@dataclass(frozen=True)
class MediaConfig:
    """What a model asks of its pictures: those that its `tower` reads, at the tokens `image` and `video`.

    `per_second`: places in time of a second of video (Qwen2.5-VL); None: a frame is one. `split`: each frame of a video
    stands by itself in the text (Qwen3-VL). `after`: where text goes on behind a video. `sound`: what it hears, if it
    does; `exact`: places are numbers of any kind, float32 (Qwen3-Omni).
    """

    tower: TowerConfig
    image: int
    video: int
    per_second: float | None = None
    split: bool = False
    after: After = "extent"
    sound: SoundConfig | None = None
    exact: bool = False

    @property
    def square(self) -> int:
        """Patches that become one token."""
        return self.tower.merge**2

    @property
    def rate(self) -> float:
        """What the step of a video is multiplied by: where a model hears, steps are seconds."""
        return 1.0 if self.sound is None or self.per_second is None else self.per_second

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that stand for media."""
        return (self.image, self.video, *([] if self.sound is None else [self.sound.token]))

    def id_of(self, kind: str) -> int:
        """The token that stands for a picture of a kind."""
        return self.image if kind == "image" else self.video


class Piece(NamedTuple):
    """A frame: its `kind` of picture, its `arrays`, its first patch among those of its kind, and the tokens `at_n` that
    its merged squares replace, in the order of `arrays`."""

    kind: str
    arrays: Frame
    source: int
    at_n: np.ndarray

    @property
    def patches(self) -> int:
        """How many patches it has."""
        return len(self.arrays.window_N)


def find(
    raw: Mapping[str, Any], tokens_T: np.ndarray, cfg: MediaConfig, clips: Sequence[Clip] = ()
) -> tuple[list[Piece], list[Picture | Scene]]:
    """All frames, of images first, and all pictures in the order of the tokens.

    `raw`: leaves of pictures, see `LEAVES`; `tokens_T`: the folded tokens; `clips`: the recordings, of which some may
    be the sound of videos.

    ValueError where pictures and the tokens that stand for them are not equally many or do not lie together, where a
    shape is empty, no multiple of the merged squares or not that of the patches, or where a number is not finite.
    """
    _require_types(raw, tokens_T, cfg)
    pieces, found = list[Piece](), list[Picture | Scene]()
    alone = {int(clip.at_n[0]): clip for clip in clips}
    for kind in KINDS:
        grid_N3 = _grids(raw, kind, cfg)
        at_M = np.flatnonzero(tokens_T == cfg.id_of(kind))
        merged = int(grid_N3.prod(1).sum()) // cfg.square
        if merged != len(at_M):
            raise ValueError(
                f"the batch has {len(at_M)} tokens of {kind}s (id {cfg.id_of(kind)}), and its {len(grid_N3)} {kind}s "
                f"have {merged} places: put as many tokens where a {kind} stands as its grid has merged squares"
            )
        step_N, cursor = _steps(raw, kind, len(grid_N3), cfg), 0
        for (frames, height, width), step in zip(grid_N3.tolist(), step_N.tolist(), strict=True):
            arrays = frame(height, width, cfg.tower.grid)
            rows, columns = height // cfg.tower.merge, width // cfg.tower.merge
            at_Fn = at_M[cursor : cursor + frames * rows * columns].reshape(frames, -1)
            for i, at_n in enumerate(at_Fn):
                source = (cursor + i * rows * columns) * cfg.square
                pieces.append(Piece(kind, arrays, source, at_n[arrays.order_n]))
            for at_n in at_Fn if cfg.split else at_Fn.reshape(1, -1):
                picture = Picture(int(at_n[0]), 1 if cfg.split else frames, rows, columns, step, cfg.rate)
                found.append(_placed(picture, at_n, tokens_T, alone, kind, cfg))
            cursor += at_Fn.size
    for clip in alone.values():
        _require_together(clip.at_n, "recording")
    return pieces, sorted(found, key=lambda item: item.first)


def _placed(
    picture: Picture, at_n: np.ndarray, tokens_T: np.ndarray, alone: dict[int, Clip], kind: str, cfg: MediaConfig
) -> Picture | Scene:
    """The picture, or with the sound that is mixed with it, which then stands no more `alone`, a scene."""
    if cfg.sound is None or kind != "video" or at_n[0] == 0 or tokens_T[at_n[0] - 1] != cfg.sound.start:
        _require_together(at_n, kind)
        return picture
    first = min((begin for begin in alone if begin > at_n[0]), default=None)
    if first is None:
        raise ValueError(f"the video at token {at_n[0]} stands where its sound is to be mixed with it, and has none")
    clip = alone.pop(first)
    stretch = cfg.sound.interleave
    return scene(picture, at_n, clip.at_n, interleave=stretch, exact=cfg.exact, room=len(tokens_T))


def _require_types(raw: Mapping[str, Any], tokens_T: np.ndarray, cfg: MediaConfig) -> None:
    if TYPES not in raw:
        return
    type_T = np.asarray(raw[TYPES]).ravel()
    known_T = 1 * (tokens_T == cfg.image) + 2 * (tokens_T == cfg.video)
    if cfg.sound is not None:
        known_T += 3 * (tokens_T == cfg.sound.token)
    if type_T.shape != known_T.shape or (type_T != known_T).any():
        raise ValueError(f"{TYPES} says another kind of some token than its id: give the tokens that it came with")


def _require_together(at_n: np.ndarray, kind: str) -> None:
    if at_n[-1] - at_n[0] != len(at_n) - 1:
        raise ValueError(
            f"the {len(at_n)} tokens of one {kind} that begin at token {at_n[0]} do not stand side by side: the tokens "
            "and the shapes are not of the same media, or not in one order"
        )


def _grids(raw: Mapping[str, Any], kind: str, cfg: MediaConfig) -> np.ndarray:
    """The shapes of a kind's pictures, int64 `[pictures, 3]`, that fit its patches."""
    if PIXELS[kind] in raw and ROWS[kind] in raw:
        raise ValueError(f"the batch has {PIXELS[kind]!r} and {ROWS[kind]!r}, what a tower reads and makes: give one")
    leaf = ROWS if ROWS[kind] in raw else PIXELS
    grid, given, merge = raw.get(GRIDS[kind]), raw.get(leaf[kind]), cfg.tower.merge
    if grid is None and given is None:
        return np.zeros((0, 3), np.int64)
    if grid is None or given is None:
        there, lacks = (GRIDS, leaf) if given is None else (leaf, GRIDS)
        raise ValueError(f"the batch has {there[kind]!r} and no {lacks[kind]!r}: give both")
    grid_N3 = grid.cpu().numpy().astype(np.int64)
    if grid_N3.ndim != 2 or grid_N3.shape[1] != 3:
        raise ValueError(f"{GRIDS[kind]} is {list(grid_N3.shape)}: give frames, rows and columns of each, [{kind}s, 3]")
    for number, (frames, rows, columns) in enumerate(grid_N3.tolist()):
        if min(frames, rows, columns) < 1 or rows % merge or columns % merge:
            raise ValueError(
                f"{kind} {number} has {frames} frames of {rows} x {columns} patches: it needs a frame, and rows and "
                f"columns that are multiples of {merge}"
            )
    tower, ends_N = cfg.tower, grid_N3.prod(1).cumsum()
    if leaf is ROWS:
        _require_numbers(given, ends_N // cfg.square, (1 + len(tower.deep_layers), tower.d_out), kind, ROWS[kind])
    else:
        _require_numbers(given, ends_N, (tower.d_patch,), kind, PIXELS[kind])
    return grid_N3


def _require_numbers(given: Tensor, ends_N: np.ndarray, row: tuple[int, ...], kind: str, leaf: str) -> None:
    """ValueError for patches, or rows of the tower, that are not those of the pictures, which end at `ends_N`."""
    wanted = (int(ends_N[-1]) if len(ends_N) else 0, *row)
    if tuple(given.shape) != wanted or not given.is_floating_point():
        raise ValueError(
            f"{leaf} is {given.dtype} {list(given.shape)}: the shapes of the {kind}s ask for floating numbers, "
            f"{list(wanted)}"
        )
    if not bool(given.sum().isfinite()) and not bool(given.isfinite().all()):
        at = int((~given.isfinite()).flatten(1).any(1).nonzero()[0])
        number = int(np.searchsorted(ends_N, at, side="right"))
        what = "a pixel that is no finite number (patch" if leaf == PIXELS[kind] else "no finite numbers (row"
        raise ValueError(f"{kind} {number} has {what} {at} of {leaf}): leave it out")


def _steps(raw: Mapping[str, Any], kind: str, pictures: int, cfg: MediaConfig) -> np.ndarray:
    """The places from one frame to the next of each picture, but for `cfg.rate`, float32 `[pictures]`."""
    name = OTHER_SECONDS if OTHER_SECONDS in raw else SECONDS
    if kind == "image" or cfg.per_second is None:
        if kind == "video" and name in raw:
            raise ValueError(f"the batch has {name!r}, and this model counts frames, not seconds: leave it out")
        return np.ones(pictures, np.float32)
    if cfg.sound is not None and pictures and name not in raw:
        raise ValueError(f"the batch has {pictures} videos and no {OTHER_SECONDS!r}: give how long a frame of each is")
    seconds_N = np.asarray(raw.get(name, np.ones(pictures)), np.float32)
    if seconds_N.shape != (pictures,) or not ((seconds_N > 0) & np.isfinite(seconds_N)).all():
        raise ValueError(f"{name} is {seconds_N.tolist()}: give {pictures} numbers above 0, one for each video")
    return seconds_N if cfg.sound is not None else np.float32(cfg.per_second) * seconds_N
