"""A diffusion transformer that makes its samples chunk by chunk, each reading those before it from a cache.

The parameters and the layers are those of `ftrain.modules.dit`. Rows of a chunk see each other and all rows of earlier
chunks of their sample (CausVid, Yin et al., arXiv 2412.07772). The cache is a value: a call returns another one and
writes into none, so steps may be differentiated and computed again.

Legend: B samples, n rows of a chunk of all samples (B times those of one), P numbers in a row, D width, S rows of text,
C width of text, G heads, K head dim, R rows of a sample in the cache, A = 3 position axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.attention import attention
from ftrain.kernels.documents import Documents, Segments
from ftrain.modules import linear
from ftrain.modules.dit import Conditions, DitConfig, Text, embedded_time, through_layers, velocities


class Kept(NamedTuple):
    """What one attention keeps of the chunks before: keys, normed and rotated, and values, both `[B, R, G, K]`."""

    k_BRGK: Tensor
    v_BRGK: Tensor


Cache = tuple[Kept, ...]
"""A `Kept` of each attention; the empty tuple is the cache of no chunk."""


def apply(
    params: dict[str, Any],
    x_nP: Tensor,
    cache: Cache,
    *,
    samples: int,
    time_n: Tensor,
    positions_An: Tensor,
    cfg: DitConfig,
    text_SC: Tensor | None = None,
    text_segments_S: Segments | None = None,
) -> tuple[Tensor, Cache]:
    """The velocities `[n, P]` of the next chunk of all samples, and the cache with this chunk behind the others.

    - `x_nP`: rows `[n, P]`, those of one sample after those of another, as many of each. `time_n`: `[n]`.
    - `cache`: of the chunks before, `()` before the first. Call with clean rows at time 0 for what later chunks read.
    - `positions_An`: int64 `[3, n]`, in the whole sample, not in the chunk.
    - `text_SC`, `text_segments_S`: as in `dit.apply`, with a document of text for each sample.

    ValueError for rows that are no equal parts of `samples`, for text that is missing or too much, and for a cache of
    another number of samples or layers. On a mesh ranks divide samples, not their rows.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import dit, spec
    >>> cfg = DitConfig(d_in=4, d_model=24, layers=1, heads=2, d_hidden=48)
    >>> params, at_An = spec.init(dit.specs(cfg), random.key(0)), torch.zeros(3, 6, dtype=torch.int64)
    >>> given = {"samples": 2, "time_n": torch.zeros(6), "positions_An": at_An, "cfg": cfg}
    >>> _, cache = apply(params, torch.ones(6, 4), (), **given)
    >>> _, cache = apply(params, torch.ones(6, 4), cache, **given)
    >>> cache[0].k_BRGK.shape
    torch.Size([2, 6, 2, 12])
    """
    _check(x_nP, cache, samples, cfg, text_SC)
    x_nD = linear.apply(params["patch"], x_nP)
    time_nD, time_n6D = embedded_time(params, time_n, x_nD.dtype, cfg)
    own = equal_documents(samples, len(x_nP) // samples, x_nP.device)
    text = None
    if text_SC is not None:
        read = text_segments_S or equal_documents(samples, len(text_SC) // samples, x_nP.device)
        text = Text(text_SC, own, read)
    at = Chunk(positions_An, segments_T=own, time_N6D=time_n6D, text=text, samples=samples, given=cache)
    velocity_nP = velocities(params, through_layers(params, x_nD, at, cfg), time_nD, cfg)
    return velocity_nP, tuple(at.entries)


def equal_documents(documents: int, rows: int, device: torch.device | str | None = None) -> Documents:
    """So many documents of as many rows each; nothing is read on the host.

    >>> equal_documents(2, 3).ids_T.tolist()
    [0, 0, 0, 1, 1, 1]
    """
    ids_n = torch.arange(documents, device=device)[:, None].expand(documents, rows).reshape(-1)
    return Documents(ids_n, torch.arange(documents + 1, dtype=torch.int32, device=device) * rows, rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class Chunk(Conditions):
    """`Conditions` of one chunk of each sample. `given`: what the chunks before have left, `entries`: that and this
    chunk, attention by attention.
    """

    samples: int
    given: Cache = ()
    entries: list[Kept] = field(default_factory=list)

    def attend(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGV: Tensor,
        *,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """What each row reads from its chunk and the chunks before, `[T, H, V]`, of queries `[T, H, K]`, keys `[T, G,
        K]` and values `[T, G, V]`. ValueError for a causal mask or a window.
        """
        if causal or window is not None:
            raise ValueError(
                f"dit_chunks: attention with causal={causal}, window={window}: rows of a chunk see each other and all "
                "rows before"
            )
        k_BRGK, v_BRGK = (x.unflatten(0, (self.samples, -1)) for x in (k_TGK, v_TGV))
        if self.given:
            before = self.given[len(self.entries)]
            k_BRGK, v_BRGK = torch.cat([before.k_BRGK, k_BRGK], 1), torch.cat([before.v_BRGK, v_BRGK], 1)
        self.entries.append(Kept(k_BRGK, v_BRGK))
        read = equal_documents(self.samples, k_BRGK.shape[1], k_TGK.device)
        return attention(
            q_THK, k_BRGK.flatten(0, 1), v_BRGK.flatten(0, 1), segments_T=self.segments_T, kv_segments_S=read,
            causal=False, scale=scale, sinks_H=sinks_H,
        )  # fmt: skip


def chunks_of(x: Tensor, *, samples: int, chunks: int) -> Sequence[Tensor]:
    """The rows `[n, ...]` of each chunk, of rows `[N, ...]` that lie sample by sample. ValueError for no equal chunks.

    >>> [part.tolist() for part in chunks_of(torch.arange(8), samples=2, chunks=2)]
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    if len(x) % (samples * chunks):
        raise ValueError(f"chunks_of: {len(x)} rows are not {chunks} equal chunks of {samples} samples")
    cut = x.unflatten(0, (samples, chunks, -1))
    return [cut[:, number].flatten(0, 1) for number in range(chunks)]


def joined_chunks(chunks: Sequence[Tensor], *, samples: int) -> Tensor:
    """Rows `[N, ...]` that lie sample by sample, of the rows `[n, ...]` of each chunk.

    >>> joined_chunks(chunks_of(torch.arange(8), samples=2, chunks=2), samples=2).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return torch.stack([x.unflatten(0, (samples, -1)) for x in chunks], 1).flatten(0, 2)


def _check(x_nP: Tensor, cache: Cache, samples: int, cfg: DitConfig, text_SC: Tensor | None) -> None:
    if samples < 1 or len(x_nP) % samples:
        raise ValueError(f"dit_chunks: {len(x_nP)} rows are not equal parts of samples={samples}")
    if (text_SC is None) != (cfg.d_text == 0):
        raise ValueError(f"dit_chunks: d_text={cfg.d_text}, but text was {'not ' if text_SC is None else ''}given")
    if cache and len(cache[0].k_BRGK) != samples:
        raise ValueError(f"dit_chunks: a cache of {len(cache[0].k_BRGK)} samples for samples={samples}")
    if cache and len(cache) < cfg.layers:
        raise ValueError(f"dit_chunks: a cache of {len(cache)} attentions for {cfg.layers} layers")
