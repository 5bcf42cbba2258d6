"""Pictures of a batch made ready for a vision tower, on the host: laid side by side, and every token placed.

What goes out has shapes that follow from the numbers of tokens and patches alone, so that other pictures of the same
total need no new trace. For ranks of a mesh, each pack's frames are dealt to equal parts of its patches; none lies in
two.

Legend: T tokens of a pack, N patches of a pack, n = N / merge**2 its tokens, B rows, L tokens of a row.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftrain.kernels.documents import ids_of
from ftrain.modules.dealing import item_parts
from ftrain.modules.mrope import Picture, places
from ftrain.modules.packing import padding
from ftrain.modules.pictures import LEAVES, PIXELS, MediaConfig, Piece, find
from ftrain.sharding.batch import BatchRows, BatchRule, TokenIndices

RULES: Mapping[str, BatchRule] = MappingProxyType({"media.*": BatchRows(), "media.index": TokenIndices()})
"""How ranks share what `prepare` makes of pictures; all other leaves have one entry per token."""

_ALONE = 16  # tokens of a frame of padding where there is no picture


def prepare(
    raw: Mapping[str, Any],
    cfg: MediaConfig,
    *,
    patches: int | None = None,
    places: int | None = None,
    packs: int = 1,
    parts: int = 1,
) -> dict[str, Any]:
    """The batch that a model reads, of raw leaves.

    Args:
        raw: "tokens" `[T]` of packs, one after the other, or rows `[B, L]`; "segments", "labels" and whatever else has
            entries for tokens; and of pictures (`ftrain.modules.pictures`) "pixels" and "pixel_values_videos"
            `[patches, numbers]`, "image_grid_thw" and "video_grid_thw" `[pictures, 3]`, "second_per_grid_ts"
            `[videos]`.
        cfg: the model's.
        patches: for each pack; None: as many as the pack with the most has. places: the same, counted in tokens.
        packs: how many equal packs the tokens are.
        parts: the ranks that share a pack, whose patches no frame may share.

    Returns:
        The raw leaves of tokens, "positions" (int64, three for each token, in the last dim), "replaced" (bool: a
        picture's row stands in the place of the token), and where there are pictures or `patches` "media", of all packs
        one after the other: "pixels", "places" `[N, 2]`, "frames" `[N]`, "index" `[n]`, and as the tower has it
        "windows" `[N]`, "taps" and "shares" `[N, 4]`.

    Raises:
        ValueError: as `ftrain.modules.pictures.find`; a picture lies in two documents; `patches` are too few, or no
            `parts` of whole squares; tokens are no equal packs.
    """
    tokens_T = raw["tokens"].flatten().cpu().numpy()
    if tokens_T.size % packs or (packs > 1 and raw["tokens"].dim() > 1):
        raise ValueError(f"tokens {list(raw['tokens'].shape)} are not {packs} equal packs, one after the other")
    if patches is None and places is not None:
        patches = places * cfg.square
    pieces, pictures = find(raw, tokens_T, cfg)
    made = {name: leaf for name, leaf in raw.items() if name not in LEAVES}
    shape = raw["tokens"].shape
    made["positions"] = torch.from_numpy(_positions(_bounds(raw, packs), pictures, cfg)).unflatten(0, shape)
    made["replaced"] = torch.from_numpy(np.isin(tokens_T, [cfg.image, cfg.video])).unflatten(0, shape)
    if pieces or patches is not None:
        dealt, room = _dealt(pieces, tokens_T.size, cfg, patches=patches, packs=packs, parts=parts)
        made["media"] = _laid(dealt, room, raw, cfg, tokens=tokens_T.size)
    return made


def _bounds(raw: Mapping[str, Any], packs: int) -> np.ndarray:
    """Where documents begin, and the end of the last: rows and packs begin with one."""
    tokens, segments = raw["tokens"], raw.get("segments")
    new_T = np.zeros(tokens.numel(), bool)
    new_T[:: tokens.shape[-1] if tokens.dim() > 1 else max(1, tokens.numel() // packs)] = True
    if segments is not None:
        ids_T = ids_of(segments).flatten().cpu().numpy()
        new_T[1:] |= ids_T[1:] != ids_T[:-1]
    return np.append(np.flatnonzero(new_T), new_T.size)


def _positions(bounds: np.ndarray, pictures: Sequence[Picture], cfg: MediaConfig) -> np.ndarray:
    """The places of all tokens, int64 `[tokens, 3]`."""
    held: list[list[Picture]] = [[] for _ in bounds[1:]]
    for picture in pictures:
        document = int(np.searchsorted(bounds, picture.first, side="right")) - 1
        if picture.first + picture.tokens > bounds[document + 1]:
            raise ValueError(f"the picture whose tokens begin at token {picture.first} lies in two documents")
        held[document].append(picture)
    spans = zip(bounds[:-1].tolist(), bounds[1:].tolist(), held, strict=True)
    return np.concatenate([np.zeros((0, 3), np.int64), *(places(*span, after=cfg.after) for span in spans)])


def _dealt(
    pieces: Sequence[Piece], tokens: int, cfg: MediaConfig, *, patches: int | None, packs: int, parts: int
) -> tuple[list[list[Piece]], int]:
    """The frames of each part of each pack, and how many patches a part has room for."""
    if patches is not None and (patches < 1 or patches % (cfg.square * parts)):
        raise ValueError(f"patches={patches} are not {parts} equal parts of whole squares of {cfg.square}")
    held: list[list[Piece]] = [[] for _ in range(packs)]
    for piece in pieces:
        held[int(piece.at_n[0]) * packs // tokens].append(piece)
    most = max(sum(piece.patches for piece in own) for own in held)
    room = -(-most // (cfg.square * parts)) * cfg.square if patches is None else patches // parts
    while (chosen := _parts_of(held, parts, room)) is None:
        if patches is not None:
            longest = max(piece.patches for piece in pieces)
            raise ValueError(
                f"a pack has pictures of {most} patches, in frames of up to {longest}, for which patches={patches} in "
                f"{parts} parts have no room: raise it, or give a pack fewer pictures"
            )
        room += cfg.square
    return chosen, room


def _parts_of(held: Sequence[Sequence[Piece]], parts: int, room: int) -> list[list[Piece]] | None:
    found: list[list[Piece]] = [[] for _ in range(len(held) * parts)]
    for pack, own in enumerate(held):
        part_of = item_parts([piece.patches for piece in own], parts=parts, capacity=room)
        if part_of is None:
            return None
        for piece, part in zip(own, part_of, strict=True):
            found[pack * parts + part].append(piece)
    return found


def _laid(
    dealt: Sequence[Sequence[Piece]], room: int, raw: Mapping[str, Any], cfg: MediaConfig, *, tokens: int
) -> dict[str, Tensor]:
    """The leaves of all parts, one after the other; an id is the first patch of what it stands for."""
    size, tower, square = room * len(dealt), cfg.tower, cfg.square
    given = [raw[name] for name in PIXELS.values() if name in raw]
    pixels = torch.zeros(size, tower.d_patch, dtype=given[0].dtype if given else torch.float32)
    leaves = {"places": np.zeros((size, 2), np.int64), "frames": np.arange(size), "windows": np.arange(size)}
    leaves |= {"taps": np.zeros((size, 4), np.int64), "shares": np.zeros((size, 4), np.float32)}
    index_n = np.full(size // square, tokens)
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
        longest = max((piece.patches for piece in pieces), default=_ALONE * square)
        rest_N, _ = padding((part + 1) * room - begin, longest, begin)
        leaves["frames"][begin : begin + len(rest_N)] = leaves["windows"][begin : begin + len(rest_N)] = rest_N
    kept = {"places", "frames", *(["windows"] if tower.window else []), *(["taps", "shares"] if tower.side else [])}
    made = {name: torch.from_numpy(array) for name, array in leaves.items() if name in kept}
    return {"pixels": pixels, "index": torch.from_numpy(index_n), **made}
