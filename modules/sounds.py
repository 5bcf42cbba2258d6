"""The recordings of a raw batch, checked: which there are, and which tokens stand for them.

Numpy and torch on the host. A recording is a run of log-mel frames (`ftrain.modules.log_mel`).

Legend: T tokens, F frames of all recordings, M mel bands, c recordings, L the most frames, n tokens of a recording.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ftrain.modules.audio_tower import AudioTowerConfig

SOUND, FRAMES = "sound", "sound_frames"
"""The leaves of recordings one after the other, floating `[F, M]`, and of their lengths in frames, int64 `[c]`."""
ROWS = "sound_rows"
"""The leaf in the place of `SOUND` where the tower read it before: its rows, floating `[tokens, width]`."""
FEATURES, MASK = "input_features", "feature_attention_mask"
"""The same as transformers' processors make it: floating `[c, M, L]`, and which of the frames are sound, `[c, L]`."""
LEAVES = (SOUND, ROWS, FRAMES, FEATURES, MASK)


@dataclass(frozen=True)
class SoundConfig:
    """What a model asks of its recordings: those that its `tower` reads, at the tokens `token`.

    `start`: the token before a recording. In front of the sound of a video it stands behind the token that begins the
    video, and the tokens of both are mixed: with `interleave` by stretches of so many places in time, each of which has
    its frames, then its sound (Qwen2.5-Omni); with None by time (Qwen3-Omni).
    """

    tower: AudioTowerConfig
    token: int
    start: int
    interleave: int | None = None


class Clip(NamedTuple):
    """A recording: its first frame among those of all, how many it has, and the tokens `at_n` that stand for it."""

    source: int
    frames: int
    at_n: np.ndarray


def listen(raw: Mapping[str, Any], tokens_T: np.ndarray, cfg: SoundConfig) -> tuple[list[Clip], Tensor]:
    """All recordings in the order of the tokens, and the frames of all, floating `[F, M]`, of which there are none
    where their rows are given.

    `raw`: leaves of recordings, see `LEAVES`; `tokens_T`: the folded tokens.

    ValueError where recordings and the tokens that stand for them are not equally many, a recording is too short for a
    token, or a number is not finite or not floating.
    """
    frames_FM, length_c = _frames(raw, cfg.tower)
    _require_numbers(frames_FM, length_c)
    counts = [cfg.tower.tokens_of(int(length)) for length in length_c]
    if 0 in counts:
        number = counts.index(0)
        raise ValueError(
            f"recording {number} has {length_c[number]} frames, too few for a token: leave it out, or fill it up with "
            "silence"
        )
    at_M = np.flatnonzero(tokens_T == cfg.token)
    if sum(counts) != len(at_M):
        raise ValueError(
            f"the batch has {len(at_M)} tokens of sound (id {cfg.token}), and its {len(counts)} recordings have "
            f"{sum(counts)}: put as many tokens where a recording stands as its frames make"
        )
    sources = np.concatenate([[0], length_c.cumsum()])
    ends = np.cumsum([0, *counts])
    clips = [Clip(int(sources[i]), int(length_c[i]), at_M[ends[i] : ends[i + 1]]) for i in range(len(counts))]
    return clips, frames_FM


def folded(raw: Mapping[str, Any], tower: AudioTowerConfig) -> dict[str, Any]:
    """The raw leaves with recordings one after the other, which can be joined with those of other documents.

    ValueError where they do not fit each other.
    """
    if FEATURES not in raw and MASK not in raw:
        return dict(raw)
    frames_FM, length_c = _frames(raw, tower)
    found = {name: leaf for name, leaf in raw.items() if name not in (FEATURES, MASK)}
    return {**found, SOUND: frames_FM, FRAMES: torch.from_numpy(length_c)}


def _frames(raw: Mapping[str, Any], tower: AudioTowerConfig) -> tuple[Tensor, np.ndarray]:
    """The frames of all recordings `[F, M]`, and their lengths."""
    if ROWS in raw:
        return _none(raw, tower)
    for there, lacks in ((SOUND, FRAMES), (FRAMES, SOUND), (FEATURES, MASK), (MASK, FEATURES)):
        if there in raw and lacks not in raw:
            raise ValueError(f"the batch has {there!r} and no {lacks!r}: give both")
    if SOUND in raw and FEATURES in raw:
        raise ValueError(f"the batch has {SOUND!r} and {FEATURES!r}, two names of its recordings: give one")
    if FEATURES in raw:
        return _unpadded(raw[FEATURES], raw[MASK], tower)
    if SOUND not in raw:
        return torch.zeros(0, tower.mels), np.zeros(0, np.int64)
    frames_FM, length_c = raw[SOUND], np.asarray(raw[FRAMES]).astype(np.int64)
    if frames_FM.dim() != 2 or frames_FM.shape[1] != tower.mels or length_c.ndim != 1:
        raise ValueError(
            f"{SOUND} is {list(frames_FM.shape)} and {FRAMES} {list(length_c.shape)}: give frames of {tower.mels} "
            f"bands of all recordings, [frames, {tower.mels}], and the lengths of the recordings"
        )
    if (length_c < 0).any() or length_c.sum() != len(frames_FM):
        raise ValueError(f"{FRAMES} {length_c.tolist()} are not the lengths of {len(frames_FM)} frames of {SOUND!r}")
    return frames_FM, length_c


def _none(raw: Mapping[str, Any], tower: AudioTowerConfig) -> tuple[Tensor, np.ndarray]:
    """No frames, and the lengths of recordings whose rows are given."""
    if SOUND in raw or FEATURES in raw or FRAMES not in raw:
        raise ValueError(f"the batch has {ROWS!r}, rows of its recordings: give {FRAMES!r} beside, and no sound")
    rows, length_c = raw[ROWS], np.asarray(raw[FRAMES]).astype(np.int64)
    wanted = [sum(tower.tokens_of(int(length)) for length in length_c), tower.d_out or tower.d_model]
    if list(rows.shape) != wanted or not rows.is_floating_point() or not bool(rows.isfinite().all()):
        raise ValueError(f"{ROWS} is {rows.dtype} {list(rows.shape)}: give finite floating numbers, {wanted}")
    return torch.zeros(0, tower.mels), length_c


def _unpadded(sound_cML: Tensor, mask_cL: Tensor, tower: AudioTowerConfig) -> tuple[Tensor, np.ndarray]:
    if sound_cML.dim() != 3 or sound_cML.shape[1] != tower.mels or mask_cL.shape != sound_cML.mT.shape[:2]:
        raise ValueError(
            f"{FEATURES} is {list(sound_cML.shape)} and {MASK} {list(mask_cL.shape)}: give recordings of {tower.mels} "
            f"bands, [recordings, {tower.mels}, frames], and [recordings, frames]"
        )
    heard_cL = mask_cL.bool()
    length_c = heard_cL.sum(1)
    if not torch.equal(heard_cL, torch.arange(mask_cL.shape[1], device=mask_cL.device) < length_c[:, None]):
        raise ValueError(f"{MASK} has silence before sound: a recording fills its first frames")
    return sound_cML.mT[heard_cL], length_c.cpu().numpy()


def _require_numbers(frames_FM: Tensor, length_c: np.ndarray) -> None:
    if not frames_FM.is_floating_point():
        raise ValueError(f"the recordings are {frames_FM.dtype}: give log-mel frames, floating numbers")
    if not bool(frames_FM.sum().isfinite()) and not bool(frames_FM.isfinite().all()):
        frame = int((~frames_FM.isfinite()).any(1).nonzero()[0])
        number = int(np.searchsorted(length_c.cumsum(), frame, side="right"))
        raise ValueError(f"recording {number} has a frame of no finite number (frame {frame} of all): leave it out")
