"""Media of a batch made ready for the towers, on the host: pictures laid side by side, and every token placed.

What goes out has shapes that follow from the numbers of tokens and patches, and bounds that grow by fours of how many
frames there are and how large, so that other pictures of the same total mostly need no new trace. For ranks of a mesh,
each pack's frames are dealt to equal parts of its patches; none lies in two.

Legend: T tokens of a pack, N patches of a pack, n = N / merge**2 its tokens, B rows, L tokens of a row.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftrain.kernels.documents import Documents, ids_of
from ftrain.modules.media_parts import PICTURES, deal
from ftrain.modules.mrope import Picture, Scene, places
from ftrain.modules.packing import padding
from ftrain.modules.pictures import LEAVES, PIXELS, ROWS, MediaConfig, Piece, find
from ftrain.modules.sound_media import laid_sound
from ftrain.modules.sounds import FEATURES, SOUND, listen
from ftrain.modules.sounds import ROWS as SOUND_ROWS
from ftrain.modules.vision_tower import TowerConfig
from ftrain.sharding.batch import BatchRows, BatchRule, Offsets, TokenIndices

RULES: Mapping[str, BatchRule] = MappingProxyType(
    {
        "media.*": BatchRows(optional=True),
        "media.*.offsets_N": Offsets(of="rows", optional=True),
        "media.index": TokenIndices(optional=True),
        "audio.*": BatchRows(optional=True),
        "audio.index": TokenIndices(optional=True),
    }
)
"""How ranks share what `prepare` makes of media, where there are any; all other leaves have one entry per token."""

_ALONE = 16  # tokens of a frame of padding where there is no picture
_LEAST = {"frames": (64, 1024), "windows": (256, 1)}  # frames of a part, and patches of one, whose bounds grow by fours


def prepare(
    raw: Mapping[str, Any],
    cfg: MediaConfig,
    *,
    patches: int | None = None,
    places: int | None = None,
    chunks: int | None = None,
    packs: int = 1,
    parts: int = 1,
    rows: bool = False,
) -> dict[str, Any]:
    """The batch that a model reads, of raw leaves.

    Args:
        raw: "tokens" `[T]` of packs, one after the other, or rows `[B, L]`; "segments", "labels" and whatever else has
            entries for tokens; and of pictures (`ftrain.modules.pictures`) "pixels" and "pixel_values_videos"
            `[patches, numbers]`, "image_grid_thw" and "video_grid_thw" `[pictures, 3]`, "second_per_grid_ts"
            `[videos]`; and of a model that hears recordings (`ftrain.modules.sounds`).
        cfg: the model's.
        patches: for each pack; None: as many as the pack with the most has. places: the same, counted in tokens of
            pictures.
        chunks: of recordings for each pack; None: as many as the pack with the most has, or, with `places`, somewhat
            more, and at least one, so that batches of a run have the same leaves and few shapes.
        packs: how many equal packs the tokens are.
        parts: the ranks that share a pack, whose patches no frame may share.
        rows: media are given as the rows that towers made of them before: "image_rows", "video_rows", "sound_rows"; a
            batch that has one of these needs not be told.

    Returns:
        The raw leaves of tokens, "positions" (int64, three for each token, in the last dim; float32 where places are
        exact), "replaced" (bool: a row of media stands in the place of the token), and where there are pictures or
        `patches` "media", of all packs one after the other: "pixels", "places" `[N, 2]`, "frames" (`Documents`),
        "index" `[n]`, and as the tower has it "windows" (`Documents`), "taps" and "shares" `[N, 4]`; where there are
        recordings or `chunks` "audio" (`ftrain.modules.sound_media`). With `rows` both have "rows" and "index" alone.

    Raises:
        ValueError: as `ftrain.modules.pictures.find` and `ftrain.modules.sounds.listen`; a picture or a recording lies
            in two documents; `patches` or `chunks` are too few, or no `parts` of whole squares; tokens are no equal
            packs.
    """
    tokens_T = raw["tokens"].flatten().cpu().numpy()
    if tokens_T.size % packs or (packs > 1 and raw["tokens"].dim() > 1):
        raise ValueError(f"tokens {list(raw['tokens'].shape)} are not {packs} equal packs, one after the other")
    if patches is None and places is not None:
        patches = places * cfg.square
    rows = _are_rows(raw, rows)
    clips, frames_FM = ([], None) if cfg.sound is None else listen(raw, tokens_T, cfg.sound)
    pieces, pictures = find(raw, tokens_T, cfg, clips)
    bounds = _bounds(raw, packs)
    for clip in clips:
        _document(int(clip.at_n[0]), int(clip.at_n[-1] - clip.at_n[0]) + 1, bounds, "recording")
    made = {name: leaf for name, leaf in raw.items() if name not in LEAVES}
    shape = raw["tokens"].shape
    made["positions"] = torch.from_numpy(_positions(bounds, pictures, cfg)).unflatten(0, shape)
    made["replaced"] = torch.from_numpy(np.isin(tokens_T, cfg.ids)).unflatten(0, shape)
    if pieces or patches is not None:
        sizes, homes = [one.patches for one in pieces], [int(one.at_n[0]) * packs // tokens_T.size for one in pieces]
        dealt, room = deal(sizes, homes, unit=cfg.square, budget=patches, packs=packs, parts=parts, told=PICTURES)
        laid = _laid_rows if rows else _laid
        made["media"] = laid([[pieces[i] for i in own] for own in dealt], room, raw, cfg, tokens=tokens_T.size)
    if cfg.sound is not None and frames_FM is not None and (clips or chunks is not None or places is not None):
        room_for = {"tokens": tokens_T.size, "chunks": chunks, "packs": packs, "parts": parts}
        tower = cfg.sound.tower
        rows_nV = raw.get(SOUND_ROWS, torch.zeros(0, tower.d_out or tower.d_model)) if rows else None
        made["audio"] = laid_sound(clips, frames_FM, cfg.sound, **room_for, easily=places is not None, rows_nV=rows_nV)
    return made


def _are_rows(raw: Mapping[str, Any], told: bool) -> bool:
    """Whether media are given as rows. ValueError for a batch that has some as rows, and others not."""
    there = [name for name in (*ROWS.values(), SOUND_ROWS) if name in raw]
    others = [name for name in (*PIXELS.values(), SOUND, FEATURES) if name in raw]
    if others and (there or told):
        rows = there[0] if there else "rows of media"
        raise ValueError(f"the batch has {others[0]!r} beside {rows}: give what towers made of all media, or of none")
    return told or bool(there)


def _bounds(raw: Mapping[str, Any], packs: int) -> np.ndarray:
    """Where documents begin, and the end of the last: rows and packs begin with one."""
    tokens, segments = raw["tokens"], raw.get("segments")
    new_T = np.zeros(tokens.numel(), bool)
    new_T[:: tokens.shape[-1] if tokens.dim() > 1 else max(1, tokens.numel() // packs)] = True
    if segments is not None:
        ids_T = ids_of(segments).flatten().cpu().numpy()
        new_T[1:] |= ids_T[1:] != ids_T[:-1]
    return np.append(np.flatnonzero(new_T), new_T.size)


def _positions(bounds: np.ndarray, items: Sequence[Picture | Scene], cfg: MediaConfig) -> np.ndarray:
    """The places of all tokens, int64 or float32 `[tokens, 3]`."""
    held: list[list[Picture | Scene]] = [[] for _ in bounds[1:]]
    for item in items:
        held[_document(item.first, item.tokens, bounds, "picture")].append(item)
    spans = zip(bounds[:-1].tolist(), bounds[1:].tolist(), held, strict=True)
    found = [places(*span, after=cfg.after, exact=cfg.exact) for span in spans]
    return np.concatenate(found) if found else places(0, 0, [], exact=cfg.exact)


def _document(first: int, tokens: int, bounds: np.ndarray, what: str) -> int:
    """The document that holds these tokens. ValueError where they lie in two."""
    document = int(np.searchsorted(bounds, first, side="right")) - 1
    if first + tokens > bounds[document + 1]:
        raise ValueError(f"the {what} whose tokens begin at token {first} lies in two documents")
    return document


def _laid(
    dealt: Sequence[Sequence[Piece]], room: int, raw: Mapping[str, Any], cfg: MediaConfig, *, tokens: int
) -> dict[str, Tensor]:
    """The leaves of all parts, one after the other; an id is the first patch of what it stands for."""
    size, tower, square = room * len(dealt), cfg.tower, cfg.square
    given = [raw[name] for name in PIXELS.values() if name in raw]
    pixels = torch.zeros(size, tower.d_patch, dtype=given[0].dtype if given else torch.float32)
    leaves = {"places": np.zeros((size, 2), np.int64), "frames": np.arange(size), "windows": np.arange(size)}
    leaves |= {"taps": np.zeros((size, 4), np.int64), "shares": np.zeros((size, 4), np.float32)}
    index_n, longest = np.full(size // square, tokens), _longest(dealt, tower)
    for part, pieces in enumerate(dealt):
        begin = part * room
        for piece in pieces:
            here, arrays = slice(begin, begin + piece.patches), piece.arrays
            own = raw[PIXELS[piece.kind]][piece.source : piece.source + piece.patches].cpu()
            if tower.window is not None:
                own = own.unflatten(0, (-1, square))[torch.from_numpy(arrays.order_n)].flatten(0, 1)
            pixels[here] = own
            leaves["places"][here], leaves["frames"][here] = arrays.places_N2, begin
            leaves["windows"][here] = begin + arrays.window_N
            if tower.side is not None:
                leaves["taps"][here], leaves["shares"][here] = arrays.taps_N4, arrays.shares_N4
            index_n[begin // square : here.stop // square] = piece.at_n
            begin = here.stop
        for name, most in longest.items():
            leaves[name][begin : (part + 1) * room], _ = padding((part + 1) * room - begin, most, begin)
    kept = {"places", "frames", *(["windows"] if tower.window else []), *(["taps", "shares"] if tower.side else [])}
    made: dict[str, Any] = {name: torch.from_numpy(array) for name, array in leaves.items() if name in kept}
    for name in kept & longest.keys():
        made[name] = _documents(made[name], len(dealt), *_LEAST[name])
    return {"pixels": pixels, "index": torch.from_numpy(index_n), **made}


def _laid_rows(
    dealt: Sequence[Sequence[Piece]], room: int, raw: Mapping[str, Any], cfg: MediaConfig, *, tokens: int
) -> dict[str, Tensor]:
    """The same of rows that the tower made before: "rows" `[n, R, V]` and "index"."""
    square, width = cfg.square, (1 + len(cfg.tower.deep_layers), cfg.tower.d_out)
    given = {kind: raw[name].cpu() for kind, name in ROWS.items() if name in raw}
    size, dtype = room * len(dealt) // square, next((x.dtype for x in given.values()), torch.float32)
    rows_nRV, index_n = torch.zeros(size, *width, dtype=dtype), np.full(size, tokens)
    for part, pieces in enumerate(dealt):
        begin = part * room // square
        for piece in pieces:
            here, first = slice(begin, begin + len(piece.at_n)), piece.source // square
            rows_nRV[here] = given[piece.kind][first + torch.from_numpy(piece.arrays.order_n)]
            index_n[here] = piece.at_n
            begin = here.stop
    return {"rows": rows_nRV, "index": torch.from_numpy(index_n)}


def _longest(dealt: Sequence[Sequence[Piece]], tower: TowerConfig) -> dict[str, int]:
    """The patches of the longest frame, and of a window."""
    most = max((piece.patches for pieces in dealt for piece in pieces), default=_ALONE * tower.merge**2)
    return {"frames": most, "windows": ((tower.window or 1) * tower.merge) ** 2}


def _documents(ids_N: Tensor, parts: int, most: int, longest: int) -> Documents:
    """Documents of these ids in so many parts, with few different bounds: of their number, and of their length."""
    new_N = torch.ones(len(ids_N), dtype=torch.bool)
    new_N[1:] = ids_N[1:] != ids_N[:-1]
    found = int(new_N.view(parts, -1).sum(1).max())
    lengths = torch.diff(new_N.nonzero().flatten(), append=torch.tensor([len(ids_N)]))
    bounds = (_by_fours(found, most), _by_fours(int(lengths.max()), longest))
    return Documents.of(ids_N, max_documents=bounds[0], longest=bounds[1], packs=parts)


def _by_fours(count: int, least: int) -> int:
    """The next of `least`, four times as many, and so on."""
    while least < count:
        least *= 4
    return least
