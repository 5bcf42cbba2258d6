"""Ulysses: around attention, tokens of all heads are exchanged for heads of all tokens, and back.

q, k and v travel in one message. A rank is sent the key/value heads that its query heads read, each once: where those
of two ranks overlap (fewer key/value heads than ranks, or a number that does not divide) both get the shared ones, and
no head is ever repeated for the sake of the arithmetic.

T tokens of a rank, n ranks, N = n * T tokens of the group, H query heads, h = H / n of them on each rank, G key/value
heads, g of them sent to each rank, R = H / G, K head dim, V value dim, C = h K + g (K + V) numbers of a token in a
message.
Source: Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.sharding.collectives import all_to_all
from ftrain.sharding.mesh import Group

PURPOSE = "ulysses"


class Heads(NamedTuple):
    """How H query heads and G key/value heads are distributed over n ranks, which divide H.

    >>> from ftrain.sharding.ulysses import Heads
    >>> heads = Heads(H=8, G=2, n=4)
    >>> heads.queries, heads.keys, heads.start(3)
    (2, 1, 1)
    """

    H: int
    G: int
    n: int

    @property
    def queries(self) -> int:
        """Query heads of a rank."""
        return self.H // self.n

    @property
    def keys(self) -> int:
        """Key/value heads that a rank is sent: the most that the query heads of any rank read."""
        return max(self._last(rank) - self._first(rank) + 1 for rank in range(self.n))

    def start(self, rank: int) -> int:
        """The first of the `keys` adjacent key/value heads that a rank is sent."""
        return min(self._first(rank), self.G - self.keys)

    @property
    def regular(self) -> bool:
        """True if on every rank local query head `t` reads local key head `t // (queries / keys)`."""
        if self.queries % self.keys:
            return False
        each = self.queries // self.keys
        reads = ((rank, t) for rank in range(self.n) for t in range(self.queries))
        return all(self._read(rank, t) - self.start(rank) == t // each for rank, t in reads)

    def _read(self, rank: int, t: int) -> int:
        return (rank * self.queries + t) * self.G // self.H

    def _first(self, rank: int) -> int:
        return self._read(rank, 0)

    def _last(self, rank: int) -> int:
        return self._read(rank, self.queries - 1)


def check_heads(H: int, G: int, group: Group, sequence: int, component: str) -> Heads:
    """How the heads are distributed. ValueError with the sizes, and what would fit, if H does not divide by the group.

    `sequence`: the ranks of the sequence axis. `component`: what the message calls it.
    """
    if H % group.size:
        legal = [u for u in range(2, sequence) if sequence % u == 0 and H % u == 0]
        hybrid = f"Hybrid(ulysses={' or '.join(map(str, legal))}), " if legal else ""
        raise ValueError(
            f"{component or 'attention'}: {H} query heads do not divide over {group.size} ranks of Ulysses; use "
            f"{hybrid}Ring(), or a sequence axis whose size divides {H}"
        )
    return Heads(H, G, group.size)


def tokens_to_heads(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, *, heads: Heads, me: Tensor, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's heads of the group's tokens: `[N, h, K]`, `[N, g, K]`, `[N, g, V]`, rank after rank.

    Where the local map of query to key heads is not the usual one, k and v are spread to h heads after the exchange.
    `me`: the rank's position in the group, 0-d int64 on the CPU.
    """
    n, h, g, K, V = heads.n, heads.queries, heads.keys, q_THK.shape[2], v_TGV.shape[2]
    parts = (q_THK.unflatten(1, (n, h)), _dealt(k_TGK, heads), _dealt(v_TGV, heads))
    send_nTC = torch.cat([x_TnhK.transpose(0, 1).flatten(2) for x_TnhK in parts], -1)
    got_NC = all_to_all(send_nTC, group, purpose=PURPOSE).flatten(0, 1)
    q_Nx, k_Nx, v_Nx = got_NC.split([h * K, g * K, g * V], -1)
    q_NhK, k_NgK, v_NgV = q_Nx.unflatten(1, (h, K)), k_Nx.unflatten(1, (g, K)), v_Nx.unflatten(1, (g, V))
    if heads.regular:
        return q_NhK, k_NgK, v_NgV
    at_h = _local_keys(heads, me).to(k_NgK.device)
    return q_NhK, k_NgK.index_select(1, at_h), v_NgV.index_select(1, at_h)


def own_heads(x_H: Tensor, *, heads: Heads, me: Tensor) -> Tensor:
    """What belongs to this rank's query heads, `[h, ...]` of `x_H` (`[H, ...]`), which all ranks hold; differentiable.

    `me`: the rank's position in the group, 0-d int64 on the CPU.
    """
    return x_H.unflatten(0, (heads.n, heads.queries)).index_select(0, me.reshape(1).to(x_H.device))[0]


def heads_to_tokens(out_NhV: Tensor, *, group: Group) -> Tensor:
    """All heads of this rank's tokens, `[T, H, V]`: the inverse of `tokens_to_heads` for the output."""
    send_nThV = out_NhV.unflatten(0, (group.size, -1))
    got_nThV = all_to_all(send_nThV, group, purpose=PURPOSE)
    return got_nThV.transpose(0, 1).flatten(1, 2)


def _dealt(x_TGK: Tensor, heads: Heads) -> Tensor:
    """`[T, n, g, K]`: the key/value heads for each rank, views as far as they divide evenly."""
    G, n, g = heads.G, heads.n, heads.keys
    if n * g == G:
        return x_TGK.unflatten(1, (n, g))
    if g == 1 and n % G == 0:
        return x_TGK[:, :, None, None].expand(-1, -1, n // G, -1, -1).flatten(1, 2)
    return torch.stack([x_TGK.narrow(1, heads.start(rank), g) for rank in range(n)], 1)


def _local_keys(heads: Heads, me: Tensor) -> Tensor:
    """`[h]`: which of the key/value heads it was sent each local query head reads; a function of the rank."""
    H, G, h = heads.H, heads.G, heads.queries
    first = (me * h * G // H).clamp(max=G - heads.keys)
    return (me * h + torch.arange(h)) * G // H - first


def ulysses_bytes(T: int, H: int, G: int, K: int, V: int, n: int, *, item: int) -> int:
    """Bytes that a rank sends to others in one attention's forward (as many in its backward): qkv there, output back.

    `T`: tokens of a rank; `item`: bytes of a number; the other sizes are those of the legend.

    >>> from ftrain.sharding.ulysses import ulysses_bytes
    >>> ulysses_bytes(T=1024, H=32, G=8, K=128, V=128, n=4, item=2)
    15728640
    """
    heads = Heads(H, G, n)
    return (n - 1) * T * (heads.queries * (K + V) + heads.keys * (K + V)) * item


def repeated_kv_bytes(T: int, H: int, G: int, K: int, V: int, n: int, *, item: int) -> int:
    """The same where key/value heads are repeated until the ranks divide them, as VeOmni does.

    Equal to `ulysses_bytes` where n divides G or G divides n (VeOmni refuses all else); elsewhere repeated to H heads.
    """
    kv = G if G % n == 0 else n if n % G == 0 else H
    return (n - 1) * T * (H * (K + V) + kv * (K + V)) // n * item
