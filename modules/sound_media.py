"""Recordings of a batch made ready for an audio tower, on the host: cut into chunks of equal length, side by side.

Shapes follow from the numbers of tokens and chunks alone. For ranks of a mesh, each pack's windows are dealt to equal
parts of its chunks; none lies in two.

Legend: F frames of all recordings, M mel bands, C chunks, W frames of a chunk, R rows of a chunk, N = C R.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ftrain.modules.media_parts import SOUND, deal
from ftrain.modules.sounds import Clip, SoundConfig


class Window(NamedTuple):
    """What of a recording attends to itself: its first frame, how many it has, and the tokens that it becomes."""

    source: int
    frames: int
    at_n: np.ndarray


def windows_of(clip: Clip, cfg: SoundConfig) -> list[Window]:
    """The windows of a recording, but for those of too few frames for a token.

    >>> import numpy as np
    >>> from ftrain.modules.audio_tower import AudioTowerConfig
    >>> tower = AudioTowerConfig(8, layers=1, heads=2, d_hidden=8, chunk=20, paired=True, d_out=8)
    >>> clip = Clip(0, 45, np.arange(11))
    >>> [(window.frames, window.at_n.tolist()) for window in windows_of(clip, SoundConfig(tower, 5, 6))]
    [(20, [0, 1, 2, 3, 4]), (20, [5, 6, 7, 8, 9]), (5, [10])]
    """
    size, found, at = cfg.tower.chunk * cfg.tower.window, list[Window](), 0
    for begin in range(0, clip.frames, size):
        frames = min(size, clip.frames - begin)
        tokens = cfg.tower.tokens_of(frames)
        if tokens:
            found.append(Window(clip.source + begin, frames, clip.at_n[at : at + tokens]))
        at += tokens
    return found


def laid_sound(
    clips: Sequence[Clip],
    frames_FM: Tensor,
    cfg: SoundConfig,
    *,
    tokens: int,
    chunks: int | None,
    packs: int,
    parts: int,
    easily: bool = False,
    rows_nV: Tensor | None = None,
) -> dict[str, Tensor]:
    """What `ftrain.modules.audio_tower.apply` reads of recordings, and "index", the token of each row that it makes.

    `tokens`: of the batch, the index of a row that has none. `chunks`: for each pack; None: as many as that with the
    most needs, or `easily` somewhat more, so that few numbers of chunks occur. `rows_nV`: what the tower made of all
    recordings before, in the order of the tokens. ValueError where there are too few chunks.

    The leaves are "mel" `[C, M, W]`, "heard" `[C]`, "parts" `[N]`, and "index", `[N]` or of pairs `[N / 2]`; of
    `rows_nV` "rows" and "index" alone.
    """
    tower = cfg.tower
    windows = [window for clip in clips for window in windows_of(clip, cfg)]
    homes = [int(window.at_n[0]) * packs // tokens for window in windows]
    sizes = [-(-window.frames // tower.chunk) for window in windows]
    dealt, room = deal(sizes, homes, unit=1, budget=chunks, packs=packs, parts=parts, told=SOUND, easily=easily)
    count, paired = room * len(dealt), 1 + tower.paired
    if rows_nV is not None:
        return _laid_rows(
            [[windows[i].at_n for i in own] for own in dealt], room * tower.rows // paired, rows_nV, tokens
        )
    mel_CWM = torch.zeros(count, tower.chunk, tower.mels, dtype=frames_FM.dtype)
    heard_C, index_CR = np.zeros(count, np.int64), np.full((count, tower.rows // paired), tokens)
    parts_CR = (np.arange(count) * tower.rows)[:, None].repeat(tower.rows, axis=1)
    for part, pieces in enumerate(dealt):
        begin = part * room
        for piece in pieces:
            window, here = windows[piece], slice(begin, begin + sizes[piece])
            _fill(mel_CWM[here], heard_C[here], window, frames_FM)
            flat_N, flat_n = parts_CR[here].reshape(-1), index_CR[here].reshape(-1)  # views
            rows = sum(tower.rows_of(int(heard)) for heard in heard_C[here])
            flat_N[:rows] = begin * tower.rows
            flat_N[rows:] = begin * tower.rows + rows
            flat_n[: len(window.at_n)] = window.at_n
            begin = here.stop
    leaves = {"heard": heard_C, "parts": parts_CR.reshape(-1), "index": index_CR.reshape(-1)}
    return {"mel": mel_CWM.mT.contiguous(), **{name: torch.from_numpy(leaf) for name, leaf in leaves.items()}}


def _laid_rows(dealt: Sequence[Sequence[np.ndarray]], room: int, rows_nV: Tensor, tokens: int) -> dict[str, Tensor]:
    """Rows that were made before, those of each part in so much room. `dealt`: the tokens of the windows of parts."""
    size = room * len(dealt)
    order_n = np.sort(np.concatenate([np.zeros(0, np.int64), *(at_n for own in dealt for at_n in own)]))
    found, index_n = torch.zeros(size, rows_nV.shape[1], dtype=rows_nV.dtype), np.full(size, tokens)
    for part, own in enumerate(dealt):
        begin = part * room
        for at_n in own:
            here = slice(begin, begin + len(at_n))
            found[here] = rows_nV[torch.from_numpy(np.searchsorted(order_n, at_n))]
            index_n[here] = at_n
            begin = here.stop
    return {"rows": found, "index": torch.from_numpy(index_n)}


def _fill(mel_CWM: Tensor, heard_C: np.ndarray, window: Window, frames_FM: Tensor) -> None:
    """Put a window's frames into its chunks, and say how many are in each."""
    mel_CWM.flatten(0, 1)[: window.frames] = frames_FM[window.source : window.source + window.frames].cpu()
    width = mel_CWM.shape[1]
    heard_C[:] = np.minimum(width, window.frames - np.arange(len(heard_C)) * width)
