"""The pictures of a raw batch of Janus checked and laid out on the host: which tokens they replace, for which ranks.

Legend: T tokens, B pictures of a kind, C channels, S pixels a side, N codes of a picture, n tokens of all pictures of a
kind.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftrain.kernels.documents import ids_of
from ftrain.modules.janus import JanusConfig
from ftrain.sharding.batch import BatchRows, BatchRule, TokenIndices

RULES: Mapping[str, BatchRule] = MappingProxyType(
    {"media.**": BatchRows(optional=True), "media.*.index": TokenIndices(optional=True)}
)
"""How ranks share what `prepare` makes of pictures; all other leaves have one entry per token."""
SEEN, TARGETS, CODES, DRAWN = "pixels", "targets", "codes", "drawn"
LEAVES = (SEEN, TARGETS, CODES, DRAWN)
"""Raw leaves of pictures."""


def prepare(
    raw: Mapping[str, Any],
    cfg: JanusConfig,
    *,
    pictures: int | None = None,
    places: int | None = None,
    packs: int = 1,
    parts: int = 1,
) -> dict[str, Any]:
    """The batch that a model reads, of raw leaves.

    Args:
        raw: "tokens" `[T]` of packs, one after the other, or rows `[B, L]`; whatever else has entries for tokens; and
            of pictures "pixels" (seen, floating `[B, C, S, S]`), and "targets" (drawn, floating `[B, C, S, S]`) or
            "codes" (drawn, int64 `[B, N]`), each in the order in which they stand in the tokens. "drawn": bool, for
            each picture in that order whether it is drawn, where some are and some are not.
        cfg: the model's.
        pictures: how many of each kind a pack has room for; None: as many as the pack with the most has. places: the
            same, counted in tokens.
        packs: how many equal packs the tokens are.
        parts: the ranks that share a pack.

    Returns:
        The leaves of tokens, "replaced" (bool: a picture's row stands in the place of the token), and where there are
        pictures or `pictures` "media": of "seen" and of "drawn" ones "pixels" or "codes", and "index" `[n]`.

    Raises:
        ValueError: pictures and the tokens that stand for them are not equally many or do not lie together; a number is
            not finite, or no code; shapes do not fit; there is no room; tokens are no equal packs.
    """
    tokens = raw["tokens"]
    tokens_T = tokens.flatten().cpu().numpy()
    if tokens_T.size % packs or (packs > 1 and tokens.dim() > 1):
        raise ValueError(f"tokens {list(tokens.shape)} are not {packs} equal packs, one after the other")
    given = _given(raw, cfg)
    flags = _flags(raw, {kind: len(found) for kind, found in given.items()})
    starts = _starts(raw, tokens_T, flags, cfg)
    made = {name: leaf for name, leaf in raw.items() if name not in LEAVES}
    made["replaced"] = torch.from_numpy(tokens_T == cfg.image).unflatten(0, tokens.shape)
    if places is not None and pictures is None:
        pictures = places // min(cfg.seen_tokens, cfg.drawn_tokens)
    media = dict[str, Any]()
    for kind in ("seen", "drawn"):
        room = _room([place * packs // tokens_T.size for place in starts[kind]], pictures, packs, parts)
        if room:
            length = cfg.seen_tokens if kind == "seen" else cfg.drawn_tokens
            own = given.get(kind, _nothing(kind, cfg))
            name = "codes" if kind == "drawn" and TARGETS not in raw else "pixels"
            media[kind] = _laid(name, own, starts[kind], length, tokens=tokens_T.size, packs=packs, room=room)
    return {**made, "media": media} if media else made


def _nothing(kind: str, cfg: JanusConfig) -> Tensor:
    if kind == "drawn":
        return torch.zeros(0, cfg.drawn_tokens, dtype=torch.int64)
    return torch.zeros(0, cfg.picture.channels, cfg.picture.size, cfg.picture.size)


def _given(raw: Mapping[str, Any], cfg: JanusConfig) -> dict[str, Tensor]:
    """Pictures of each kind that the batch has, checked."""
    if TARGETS in raw and CODES in raw:
        raise ValueError("the batch has 'targets' and 'codes', which both say what is drawn: give one of them")
    found = dict[str, Tensor]()
    for name, kind, of in ((SEEN, "seen", cfg.picture), (TARGETS, "drawn", cfg.codec)):
        if name in raw:
            found[kind] = _checked_pixels(raw[name].cpu(), name, (of.channels, of.size, of.size))
    if CODES in raw:
        codes = raw[CODES].cpu()
        if codes.dtype != torch.int64 or codes.dim() != 2 or codes.shape[1] != cfg.drawn_tokens:
            raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}: give int64 [pictures, {cfg.drawn_tokens}]")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < cfg.codec.vocabulary:
            raise ValueError(f"codes reach {int(codes.max())}: the tokenizer has {cfg.codec.vocabulary}, from 0 on")
        found["drawn"] = codes
    return found


def _checked_pixels(pixels: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(pixels.shape[1:]) != shape or not pixels.is_floating_point():
        raise ValueError(
            f"{name} are {pixels.dtype} {list(pixels.shape)}: give floating pictures [pictures, "
            f"{', '.join(map(str, shape))}], resized and normed as the model learned them"
        )
    if not bool(pixels.isfinite().all()):
        number = int((~pixels.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"picture {number} of {name} has a pixel that is no finite number: leave it out")
    return pixels


def _flags(raw: Mapping[str, Any], counts: Mapping[str, int]) -> list[bool]:
    """For each picture in the order of the tokens whether it is drawn."""
    seen, drawn = counts.get("seen", 0), counts.get("drawn", 0)
    if DRAWN not in raw:
        if seen and drawn:
            raise ValueError(
                f"the batch has {seen} pictures to be seen and {drawn} to be drawn: give 'drawn', for each in the "
                "order of the tokens whether it is drawn"
            )
        return [bool(drawn)] * (seen + drawn)
    flags = [bool(flag) for flag in raw[DRAWN].flatten().tolist()]
    if sum(flags) != drawn or len(flags) != seen + drawn:
        raise ValueError(
            f"'drawn' says that {sum(flags)} of {len(flags)} pictures are drawn, and the batch has {seen} to be seen "
            f"and {drawn} to be drawn: give one entry for each"
        )
    return flags


def _starts(
    raw: Mapping[str, Any], tokens_T: np.ndarray, flags: Sequence[bool], cfg: JanusConfig
) -> dict[str, list[int]]:
    """The first token of each picture of each kind."""
    at_n, starts, cursor = np.flatnonzero(tokens_T == cfg.image), {"seen": list[int](), "drawn": list[int]()}, 0
    wanted = sum(cfg.drawn_tokens if flag else cfg.seen_tokens for flag in flags)
    if len(at_n) != wanted:
        raise ValueError(
            f"the batch has {len(at_n)} tokens of pictures (id {cfg.image}), and its {len(flags)} pictures have "
            f"{wanted} rows: put {cfg.seen_tokens} tokens where one is seen and {cfg.drawn_tokens} where one is drawn"
        )
    new_T = _new_documents(raw, tokens_T)
    for flag in flags:
        length = cfg.drawn_tokens if flag else cfg.seen_tokens
        own = at_n[cursor : cursor + length]
        first = int(own[0])
        if own[-1] - first != length - 1 or new_T[first + 1 : first + length].any():
            raise ValueError(f"the {length} tokens of the picture that begins at token {first} do not lie side by side")
        if flag and new_T[first]:
            raise ValueError(f"the picture that is drawn at token {first} begins its document: put a token before it")
        starts["drawn" if flag else "seen"].append(first)
        cursor += length
    return starts


def _new_documents(raw: Mapping[str, Any], tokens_T: np.ndarray) -> np.ndarray:
    """Which tokens begin a document; a row begins with one."""
    tokens, segments = raw["tokens"], raw.get("segments")
    new_T = np.zeros(tokens_T.size, bool)
    new_T[:: tokens.shape[-1] if tokens.dim() > 1 else max(1, tokens_T.size)] = True
    if segments is not None:
        ids_T = ids_of(segments).flatten().cpu().numpy()
        if ids_T.size != tokens_T.size:
            raise ValueError(f"segments have {ids_T.size} entries for {tokens_T.size} tokens: give one for each")
        new_T[1:] |= ids_T[1:] != ids_T[:-1]
    return new_T


def _room(pack_of: Sequence[int], pictures: int | None, packs: int, parts: int) -> int:
    """Pictures that each pack has room for, equally many for each of its ranks."""
    most = max((list(pack_of).count(pack) for pack in range(packs)), default=0)
    if pictures is not None and most > pictures:
        raise ValueError(f"a pack has {most} pictures of a kind, and room for {pictures}: raise it, or give it fewer")
    wanted = most if pictures is None else pictures
    return -(-wanted // parts) * parts


def _laid(
    name: str, own: Tensor, starts: Sequence[int], length: int, *, tokens: int, packs: int, room: int
) -> dict[str, Tensor]:
    """The pictures of all packs, and the tokens that they replace; room that is left over replaces none."""
    made = own.new_zeros(packs * room, *own.shape[1:])
    index = np.full((packs * room, length), tokens)
    filled = [0] * packs
    for number, start in enumerate(starts):
        pack = start * packs // tokens
        at = pack * room + filled[pack]
        made[at], index[at] = own[number], np.arange(start, start + length)
        filled[pack] += 1
    return {name: made, "index": torch.from_numpy(index.flatten())}
