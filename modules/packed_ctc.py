"""The CTC loss of a pack: what each recording's text costs, laid over the frames that it has among the pack's tokens.

Frames of many recordings lie in one pack, anywhere and with other tokens between them; a row of places says where
those of one recording are. On a mesh the ranks may share the pack: rows are gathered over it (`TokenIndices`).

Legend: T tokens of a pack, B recordings, L frames of the longest, N tokens of the longest text, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.ctc import ctc_nats
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.mean import Mean
from ftrain.kernels.pack import pack_tokens, take_rows
from ftrain.sharding.batch import BatchRows, BatchRule, TokenIndices


class Transcripts(NamedTuple):
    """Where recordings are in a pack and what is said in them.

    `place_BL`: int64, the tokens that hold the frames of a recording, in their order, then T for no frame. `text_BN`:
    int64, of which the first `length_B` of each row are the text.
    """

    place_BL: Tensor
    text_BN: Tensor
    length_B: Tensor


RULES: Mapping[str, BatchRule] = MappingProxyType(
    {"place_BL": TokenIndices(), "text_BN": BatchRows(), "length_B": BatchRows()}
)
"""How ranks share the leaves of `Transcripts`."""


def lay(
    places: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    tokens: int,
    rows: int | None = None,
    frames: int = 1,
    length: int = 1,
) -> Transcripts:
    """Transcripts of recordings whose frames are at these places of a pack of so many `tokens`.

    The arrays have `rows` rows, the rest without frames and text (None: those given), and room for at least so many
    `frames` and a text of so many tokens (`length`), so that all packs can have arrays of one size.

    ValueError where the counts differ, a place is not in the pack, or a text cannot be laid over so few frames (two
    equal tokens in a row need a frame between them).

    >>> lay([[0, 1, 2, 3]], [[5, 5]], tokens=6).place_BL.tolist()
    [[0, 1, 2, 3]]
    """
    rows = len(places) if rows is None else rows
    if not len(places) == len(texts) <= rows:
        raise ValueError(f"{len(places)} recordings and {len(texts)} texts in {rows} rows: each needs one of each")
    for i, (own, text) in enumerate(zip(places, texts, strict=True)):
        need = len(text) + sum(a == b for a, b in pairwise(text))
        if need > len(own):
            raise ValueError(
                f"recording {i}: a text of {len(text)} tokens needs {need} frames, and there are {len(own)}: give it "
                "more frames a second, or leave it out"
            )
        if any(not 0 <= place < tokens for place in own):
            raise ValueError(f"recording {i}: its frames are at {min(own)} to {max(own)} of a pack of {tokens} tokens")
    place_BL = torch.full((rows, max(frames, *map(len, places), 1)), tokens)
    text_BN = torch.zeros(rows, max(length, *map(len, texts), 1), dtype=torch.int64)
    length_B = torch.zeros(rows, dtype=torch.int64)
    for i, (own, text) in enumerate(zip(places, texts, strict=True)):
        place_BL[i, : len(own)] = torch.tensor(own)
        text_BN[i, : len(text)] = torch.tensor(text, dtype=torch.int64)
        length_B[i] = len(text)
    return Transcripts(place_BL, text_BN, length_B)


def ctc_loss(scores_TV: Tensor, said: Transcripts, *, blank: int) -> Mean:
    """The nats of all texts over the number of their tokens. `scores_TV`: floating, of all tokens of the pack, of which
    frames are read; `blank`: the token that says nothing.

    A text that cannot be laid over its frames costs and counts nothing. ValueError for a blank beyond the vocabulary.

    >>> even_TV = torch.zeros(3, 4)
    >>> round(ctc_loss(even_TV, lay([[1, 2]], [[3]], tokens=3), blank=0).value().exp().item(), 4)  # 3 ways of 16
    5.3333
    """
    if not 0 <= blank < scores_TV.shape[-1]:
        raise ValueError(f"blank={blank} is no token of a vocabulary of {scores_TV.shape[-1]}")
    rows, longest = said.place_BL.shape
    scores = take_rows(scores_TV, said.place_BL.flatten())
    logp_BLV = scores.to(accumulate_dtype(scores.dtype)).log_softmax(-1).unflatten(0, (rows, longest))
    frames_B = (said.place_BL < pack_tokens(len(scores_TV))).sum(1)
    nats_B = ctc_nats(logp_BLV, said.text_BN, frames_B, said.length_B, blank=blank)
    fits_B = _needed(said) <= frames_B
    counted_B = torch.where(fits_B, said.length_B, 0)
    return Mean(torch.where(counted_B > 0, nats_B, 0).sum(), counted_B.sum().to(nats_B.dtype))


def _needed(said: Transcripts) -> Tensor:
    """The frames that each text needs at least, `[B]`."""
    places = torch.arange(said.text_BN.shape[1], device=said.text_BN.device)
    twice_BN = (said.text_BN[:, 1:] == said.text_BN[:, :-1]) & (places[1:] < said.length_B[:, None])
    return said.length_B + twice_BN.sum(1)


def collapsed(tokens_L: Sequence[int], *, blank: int) -> list[int]:
    """The text that frames say: of equal neighbours one, and no blanks.

    >>> collapsed([0, 5, 5, 0, 5, 6, 6], blank=0)
    [5, 5, 6]
    """
    before = [blank, *tokens_L]
    return [token for token, last in zip(tokens_L, before, strict=False) if token not in (blank, last)]
