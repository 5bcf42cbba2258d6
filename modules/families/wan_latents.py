"""Clips of latents as rows of a pack, and back: patches, their places, and a batch of clips side by side.

A row holds a patch with channels first, `(channel, frame, row, column)`, in the input as in the velocity, so that data,
noise, conditions and velocity can be added, subtracted and compared row by row.

Legend: N rows of a batch, P numbers of a row, C channels, F latent frames, H and W rows and columns of latents, S text
rows, I rows of pictures, M times.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.documents import Documents
from ftrain.modules.families.wan_config import Patch, WanConfig
from ftrain.sharding.batch import BatchRule, Replicated, Tokens


@dataclass(frozen=True, eq=False)
class Clip:
    """One clip of a batch.

    - `input_CFHW`: noised latents, and behind them the channels of conditions where the model has any.
    - `time`: in [0, 1], or one for each frame of patches (an image-to-video model that gets its first frame clean).
    - `text_SC`: states of the text, at most as many rows as the model reads. `image_IC`: rows of the image encoder.
    - `target_CFHW`: what the velocity is to be, noise less data. `learned_F`: bool, the frames of patches that count in
      the loss; None for all.
    """

    input_CFHW: Tensor
    time: float | Sequence[float]
    text_SC: Tensor
    image_IC: Tensor | None = None
    target_CFHW: Tensor | None = None
    learned_F: Tensor | None = None


def rules(cfg: WanConfig) -> dict[str, BatchRule]:
    """What `ftrain.sharding.Plan(batch=...)` must know of the leaves of `lay`: all others have an entry for each row.

    >>> sorted(rules(WanConfig(4, 4, d_model=24, layers=1, heads=2, d_hidden=32)))
    ['text', 'times']
    """
    pictures: dict[str, BatchRule] = {"image": Tokens()} if cfg.d_image else {}
    return {"times": Replicated(), "text": Tokens(), **pictures}


def patchify(latents_CFHW: Tensor, patch: Patch) -> Tensor:
    """Latents `[C, F, H, W]` as rows `[N, P]`: frame by frame, and row by row within.

    ValueError for sizes that are no multiples of the patch.

    >>> patchify(torch.arange(8).view(2, 1, 2, 2), (1, 2, 2)).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    channels = latents_CFHW.shape[0]
    f, h, w = grid(latents_CFHW.shape[1:], patch)
    split = latents_CFHW.reshape(channels, f, patch[0], h, patch[1], w, patch[2])
    return split.permute(1, 3, 5, 0, 2, 4, 6).reshape(f * h * w, -1)


def unpatchify(x_NP: Tensor, sizes: Sequence[int], patch: Patch) -> Tensor:
    """Rows `[N, P]` as latents `[C, F, H, W]`, of which the last three `sizes` are given: the inverse of `patchify`.

    ValueError for sizes that are no multiples of the patch or of other rows.

    >>> latents = torch.randn(3, 2, 4, 6)
    >>> torch.equal(unpatchify(patchify(latents, (1, 2, 2)), (2, 4, 6), (1, 2, 2)), latents)
    True
    """
    f, h, w = grid(sizes, patch)
    if len(x_NP) != f * h * w or x_NP.shape[1] % math.prod(patch):
        raise ValueError(f"{list(x_NP.shape)} rows are no latents of {list(sizes)} in patches of {list(patch)}")
    split = x_NP.reshape(f, h, w, -1, *patch)
    return split.permute(3, 0, 4, 1, 5, 2, 6).reshape(-1, *sizes)


def grid(sizes: Sequence[int], patch: Patch) -> tuple[int, int, int]:
    """Patches along frames, rows and columns of latents of these three sizes. ValueError where they do not divide.

    >>> grid((21, 60, 104), (1, 2, 2))
    (21, 30, 52)
    """
    if any(n % p or n < 1 for n, p in zip(sizes, patch, strict=True)):
        raise ValueError(
            f"latents of {sizes[0]} frames x {sizes[1]} x {sizes[2]} do not divide into patches of {list(patch)}: crop "
            f"or pad the clip (of pixels, rows and columns must be multiples of 8 x {patch[1]} for Wan 2.1)"
        )
    f, h, w = (n // p for n, p in zip(sizes, patch, strict=True))
    return f, h, w


def places(patches: tuple[int, int, int]) -> Tensor:
    """Frame, row and column of each patch of a clip with so many along each axis, int64 `[N, 3]`.

    >>> places((1, 2, 2)).tolist()
    [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    """
    return torch.cartesian_prod(*map(torch.arange, patches)).reshape(-1, 3)


def lay(
    packs: Sequence[Sequence[Clip]],
    cfg: WanConfig,
    *,
    rows: int | None = None,
    clips: int | None = None,
    times: int | None = None,
    multiple: int = 1,
) -> dict[str, Any]:
    """A batch of packs, each some clips side by side, as the model of `ftrain.bridge` takes it; made on the host.

    - `rows`, `clips`, `times`: of each pack, so that all batches have the same shapes; the most that are there if None.
      Rows that are missing belong to no clip.
    - `multiple`: rows of every kind are filled up to a multiple of this, the ranks that share a pack (twice as many for
      a ring).

    Leaves: `latents` [N, P], `times` [M], `time_rows` int64 [N] (not with one time), `positions` int64 [N, 3], `text`
    [S, C], with pictures `image` [I, C], `segments`, `text_segments` and `image_segments` (`Documents`), and with
    targets `target` [N, Q], `valid` bool [N].

    Raises:
        ValueError: a clip is not of this model (channels, patches, places, width or length of the text, pictures), has
            a time out of the model's range, or there is no room for a pack.
    """
    made = [[_rows_of(clip, cfg) for clip in pack] for pack in packs]
    first = next((clip for pack in made for clip in pack), None)
    if first is None:
        raise ValueError("packs without a clip: give one at least")
    most = max(sum(len(c.latents) for c in pack) for pack in made)
    room = _up(most if rows is None else rows, multiple)
    slots = max(len(pack) for pack in made) if clips is None else clips
    kinds = {"latents": room, "text": _up(slots * cfg.text_rows, multiple)}
    if cfg.d_image:
        pictures = [sum(len(c.image) for c in pack if c.image is not None) for pack in made]
        kinds["image"] = _up(max(pictures), multiple)
    if most > room or max(map(len, made)) > slots:
        raise ValueError(
            f"a pack has {most} rows and {max(map(len, made))} clips, and there is room for {room}, {slots}"
        )
    batch: dict[str, Any] = {}
    for kind, length in kinds.items():
        like = getattr(first, kind)
        batch[kind] = torch.cat([_filled([getattr(c, kind) for c in pack], length, like) for pack in made])
        name = "segments" if kind == "latents" else f"{kind}_segments"
        batch[name] = _documents([[len(getattr(c, kind)) for c in pack] for pack in made], length, slots + 1)
    batch["positions"] = torch.cat([_filled([c.positions for c in pack], room, first.positions) for pack in made])
    return {**batch, **_targets(made, room), **_times(made, room, times)}


@dataclass(frozen=True, eq=False)
class _Rows:
    """A clip as rows: `times` is one number for each."""

    latents: Tensor
    positions: Tensor
    times: Tensor
    text: Tensor
    image: Tensor | None
    target: Tensor | None
    valid: Tensor


def _rows_of(clip: Clip, cfg: WanConfig) -> _Rows:
    patches = grid(clip.input_CFHW.shape[1:], cfg.patch)
    _check(clip, patches, cfg)
    each = patches[1] * patches[2]
    found = torch.tensor(clip.time, dtype=torch.float32).reshape(-1)
    if len(found) not in (1, patches[0]):
        raise ValueError(
            f"a clip has {len(found)} times, and {patches[0]} frames of patches: give one, or one for each"
        )
    learned = torch.ones(patches[0], dtype=torch.bool) if clip.learned_F is None else clip.learned_F
    short = cfg.text_rows - len(clip.text_SC)
    return _Rows(
        patchify(clip.input_CFHW, cfg.patch),
        places(patches),
        found.expand(patches[0]).repeat_interleave(each),
        torch.cat([clip.text_SC, clip.text_SC.new_zeros(short, cfg.d_text)]),
        clip.image_IC,
        None if clip.target_CFHW is None else patchify(clip.target_CFHW, cfg.patch),
        learned.repeat_interleave(each),
    )


def _check(clip: Clip, patches: tuple[int, int, int], cfg: WanConfig) -> None:
    channels, (length, width) = clip.input_CFHW.shape[0], clip.text_SC.shape
    if channels != cfg.channels_in:
        raise ValueError(
            f"a clip has {channels} channels, and the model takes {cfg.channels_in} (latents and their conditions): "
            "take the latents of its own VAE"
        )
    if max(patches) > cfg.most_places:
        raise ValueError(f"a clip has {patches} patches, and the model places for {cfg.most_places} along an axis")
    if length > cfg.text_rows or width != cfg.d_text:
        raise ValueError(
            f"a text of {length} rows x {width}, and the model reads up to {cfg.text_rows} x {cfg.d_text}: cut the "
            "tokens before the text encoder"
        )
    if (clip.image_IC is None) == bool(cfg.d_image):
        raise ValueError(
            f"d_image={cfg.d_image}, but a clip has {'no ' if clip.image_IC is None else ''}rows of pictures"
        )
    times = [clip.time] if isinstance(clip.time, int | float) else list(clip.time)
    low, high = cfg.times
    beyond = [t for t in times if not (low <= t < high or t == high == 1)]
    if beyond:
        raise ValueError(
            f"a clip has time {beyond[0]:g}, and the model is for times from {low:g} to {high:g}: draw times of this "
            "range, or train the other expert"
        )


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _filled(parts: Sequence[Tensor], length: int, like: Tensor) -> Tensor:
    """The parts one after the other, and zeros; `like` one of another pack, where this one has none."""
    whole = torch.cat([like[:0], *parts])
    return torch.cat([whole, whole.new_zeros(length - len(whole), *whole.shape[1:])])


def _documents(lengths: list[list[int]], length: int, slots: int) -> Documents:
    """Clip n of a pack is document n, whatever rows are meant; what is left of a pack is the document behind."""
    ids, ends, first = list[Tensor](), [0], 0
    for number, own in enumerate(lengths):
        counts = [*own, *[0] * (slots - 1 - len(own)), length - sum(own)]
        ids.append(torch.repeat_interleave(torch.arange(slots) + number * slots, torch.tensor(counts)))
        ends += [first + end for end in accumulate(counts)]
        first += length
    return Documents(torch.cat(ids), torch.tensor(ends, dtype=torch.int32), length)


def _targets(made: list[list[_Rows]], room: int) -> dict[str, Tensor]:
    given = [c.target is not None for pack in made for c in pack]
    first = next(clip for pack in made for clip in pack)
    if not any(given):
        return {}
    if not all(given):
        raise ValueError("some clips have a target and some have none")
    return {
        "target": torch.cat([_filled([c.target for c in pack], room, first.target) for pack in made]),  # type: ignore
        "valid": torch.cat([_filled([c.valid for c in pack], room, first.valid) for pack in made]),
    }


def _times(made: list[list[_Rows]], room: int, slots: int | None) -> dict[str, Tensor]:
    """The times of each clip once, and the number of each row's."""
    told = [[c.times.unique(return_inverse=True) for c in pack] for pack in made]
    most = max(1, *(sum(len(values) for values, _ in pack) for pack in told))
    slots = most if slots is None else slots
    if most > slots:
        raise ValueError(f"a pack has {most} different times, and there is room for {slots}")
    times, rows = list[Tensor](), list[Tensor]()
    for number, pack in enumerate(told):
        starts = accumulate((len(values) for values, _ in pack), initial=number * slots)
        times.append(_filled([values for values, _ in pack], slots, torch.zeros(0)))
        at = [inverse + start for (_, inverse), start in zip(pack, starts, strict=False)]
        rows.append(_filled(at, room, torch.zeros(0, dtype=torch.int64)))
    whole = torch.cat(times)
    return {"times": whole} if len(whole) == 1 else {"times": whole, "time_rows": torch.cat(rows)}
