"""The keys and values of sequences that grow one token at a time, so that a token need not be computed twice.

A cache is made from the packed keys and values of the prompts, with memory for as many more tokens as are to come.
Sequences may differ in length: each fills its row from the left, and what lies behind its end is never read. All are
plain functions from cache to cache, but for one thing: `append` writes into the memory of the cache that it is given,
since a copy of all of it would cost more than the token. Whoever goes on from one cache in two ways clones it before.

Legend: B sequences, S places of a sequence, T tokens of a pack, G key/value heads, H query heads, R = H / G, K head
dim, V that of values.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerCache(NamedTuple):
    """Keys (normed and rotated) and values of one layer; a head's places lie side by side, as its queries read them."""

    k_BGSK: Tensor
    v_BGSK: Tensor


class KvCache(NamedTuple):
    """What a stack keeps of its sequences; `length_B` int64: how many places of each are filled, which may be none.

    `layers`: a `LayerCache` of each attention, or the state of a block with a memory of its own
    (`ftrain.modules.block.Cache`), in the order in which the stack runs them. `room`: how many tokens can still be
    appended to every sequence. It is known to the host, so nothing waits for it.
    """

    layers: tuple[Any, ...]
    length_B: Tensor
    room: int


class Unpacking(NamedTuple):
    """Where each of T packed tokens goes: its sequence and its place in it, int64 `[T]`, of `sequences` times `places`.

    Called with rows of the pack `[T, G, K]` it gives rows of sequences `[B, G, S, K]`.
    """

    sequence_T: Tensor
    place_T: Tensor
    sequences: int
    places: int

    def __call__(self, x_TGK: Tensor) -> Tensor:
        """The same rows as `[B, G, S, K]`, with zeros where there is no token."""
        # zeros and not just any memory: what is masked is multiplied by 0, and 0 * NaN is NaN
        x_BGSK = x_TGK.new_zeros(self.sequences, x_TGK.shape[1], self.places, x_TGK.shape[2])
        x_BGSK[self.sequence_T, :, self.place_T] = x_TGK
        return x_BGSK


def unpacking(length_B: Tensor, *, tokens: int, room: int) -> Unpacking:
    """Where the tokens of packed sequences go, with `room` places behind each sequence.

    `length_B` int64: how many tokens each sequence has, in the order of the pack; 0 for one that has yet to begin.
    ValueError if `room` is negative or the lengths do not sum to `tokens`.

    >>> unpacking(torch.tensor([2, 0, 1]), tokens=3, room=4).place_T.tolist()
    [0, 1, 0]
    """
    total = int(length_B.sum())
    if room < 0 or tokens != total:
        raise ValueError(
            f"kv_cache: {tokens} packed tokens, lengths that sum to {total}, room={room}: "
            "lengths must sum to the tokens, and room must be at least 0"
        )
    begin_B = length_B.cumsum(0) - length_B
    sequence_T = torch.repeat_interleave(length_B, output_size=tokens)
    place_T = torch.arange(tokens, device=length_B.device) - begin_B[sequence_T]
    return Unpacking(sequence_T, place_T, len(length_B), int(length_B.max()) + room)


def from_packed(layers: Sequence[tuple[Tensor, Tensor]], length_B: Tensor, *, room: int) -> KvCache:
    """The cache of packed sequences, from each layer's keys and values `[T, G, K]`; `length_B`, `room`, errors: as in
    `unpacking`.
    """
    unpack = unpacking(length_B, tokens=layers[0][0].shape[0], room=room)
    return KvCache(tuple(LayerCache(unpack(k), unpack(v)) for k, v in layers), length_B, room)


def append(layer: LayerCache, k_BGK: Tensor, v_BGK: Tensor, length_B: Tensor) -> LayerCache:
    """The layer with one more token per sequence, at place `length_B` of each; the given layer's memory is reused."""
    row_B = torch.arange(len(length_B), device=length_B.device)
    layer.k_BGSK[row_B, :, length_B] = k_BGK
    layer.v_BGSK[row_B, :, length_B] = v_BGK
    return layer


def seen(cache: KvCache, *, window: int | None) -> Tensor:
    """Which places the newest token of each sequence sees, bool `[B, S]`; S ends with the longest sequence.

    `window`: it sees at most the `window` latest, its own included; `None`: all.
    """
    filled = cache.layers[0].k_BGSK.shape[2] - cache.room
    place_S, length_B1 = torch.arange(filled, device=cache.length_B.device), cache.length_B[:, None]
    seen_BS = place_S < length_B1
    return seen_BS if window is None else seen_BS & (place_S >= length_B1 - window)


def attend(
    q_BHK: Tensor,
    layer: LayerCache,
    seen_BS: Tensor,
    *,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """What one query per sequence reads from the places that it sees (at least one), `[B, H, V]`.

    Query head h reads key head `h // R`. `scale` of the scores: `K ** -0.5` if None. `sinks_H`: a score of each head
    that has no value. The softmax is in float32, or float64 for float64.
    """
    k_BGSK, v_BGSV = (x_BGSK[:, :, : seen_BS.shape[1]] for x_BGSK in layer)
    # The R query heads of a key head stand where queries of one head would: no key is copied.
    q_BGRK, seen_B11S = q_BHK.unflatten(1, (k_BGSK.shape[1], -1)), seen_BS[:, None, None]
    if sinks_H is not None:
        return _attend_with_sinks(q_BGRK, k_BGSK, v_BGSV, seen_B11S, sinks_H, scale).flatten(1, 2)
    out_BGRV = F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSV, attn_mask=seen_B11S, scale=scale)
    return out_BGRV.flatten(1, 2)


def _attend_with_sinks(
    q_BGRK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, seen_B11S: Tensor, sinks_H: Tensor, scale: float | None
) -> Tensor:
    wide = torch.promote_types(q_BGRK.dtype, torch.float32)
    scale = q_BGRK.shape[-1] ** -0.5 if scale is None else scale
    scores_BGRS = ((q_BGRK * scale).to(wide) @ k_BGSK.mT.to(wide)).masked_fill(~seen_B11S, float("-inf"))
    sinks_BGR1 = sinks_H.to(wide).view(1, *q_BGRK.shape[1:3], 1).expand(len(q_BGRK), -1, -1, -1)
    weights_BGRS = torch.cat([scores_BGRS, sinks_BGR1], -1).softmax(-1)[..., :-1]
    return (weights_BGRS @ v_BGSV.to(wide)).to(q_BGRK.dtype)
