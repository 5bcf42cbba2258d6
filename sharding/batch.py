"""Which rank sees what of a batch: tokens in the order of the sequence axis, rows of media, indices of rows.

A batch of the whole mesh is one pack after the other, one pack for each data rank (replicate x shard); the ranks of the
sequence axis share a pack. A pack's tokens are divided into chunks, and its media into equal runs of rows.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ftrain.sharding.mesh import Mesh


@dataclass(frozen=True)
class Tokens:
    """A leaf with one entry per token along `dim`: token ids `[T]`, positions `[A, T]` with `dim=1`.

    `optional`: a batch may lack such leaves; else a rule that matches none is an error.
    """

    dim: int = 0
    optional: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class BatchRows:
    """A leaf whose `dim` is divided evenly among all ranks: features of media, targets of decoders.

    `optional`: as of `Tokens`.

    >>> import torch
    >>> from ftrain.sharding import BatchRows, Mesh
    >>> from ftrain.sharding.batch import TokenOrder, share
    >>> mesh = Mesh(shard=2, kind="virtual")
    >>> share(torch.arange(6), BatchRows(), path="rows", tokens=8, order=TokenOrder(), mesh=mesh, rank=1)
    tensor([3, 4, 5])
    """

    dim: int = 0
    optional: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class TokenIndices:
    """int64 rows that hold the index in the batch of the token that a row stands at; the number of tokens means none.

    The rows are divided evenly among all ranks, and a rank sees indices in its own pack. `optional`: as of `Tokens`.

    >>> import torch
    >>> from ftrain.sharding import Mesh, TokenIndices
    >>> from ftrain.sharding.batch import TokenOrder, share
    >>> mesh, index = Mesh(shard=2, kind="virtual"), torch.tensor([0, 8, 5, 7])
    >>> share(index, TokenIndices(), path="index", tokens=8, order=TokenOrder(), mesh=mesh, rank=1)
    tensor([1, 3])
    """

    optional: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class Replicated:
    """A leaf that every rank sees whole, such as a 0-d temperature. `optional`: as of `Tokens`."""

    optional: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class Offsets:
    """Offsets of documents along `dim` (`ftrain.kernels.documents.Documents`), with as many entries for each part of
    the batch.

    `of`: "packs" (each rank sees the offsets of its whole pack), or "rows" (those of its own rows of media).
    `optional`: as of `Tokens`.
    """

    dim: int = 0
    of: Literal["packs", "rows"] = "packs"
    optional: bool = field(default=False, repr=False)


BatchRule = Tokens | BatchRows | TokenIndices | Replicated | Offsets


def may_be_missing(rule: BatchRule) -> bool:
    """True for a rule about leaves that a batch may lack."""
    return rule.optional


def default_rule(path: str) -> BatchRule:
    """The rule of a leaf of which nobody says one: offsets of `Documents` are those of packs, a random `key` is the
    same everywhere, all else has one entry per token.
    """
    name = path.rpartition(".")[2]
    if name == "offsets_N":
        return Offsets()
    return Replicated() if name == "key" else Tokens()


class TokenOrder(NamedTuple):
    """How `ranks` share the tokens of a pack: consecutive runs, or with `zigzag` over the `ring` (see
    `ftrain.sharding.layout.Ring`).

    >>> from ftrain.sharding.batch import TokenOrder
    >>> TokenOrder(ranks=2, ring=2, zigzag=True).order(8)
    tensor([0, 1, 6, 7, 2, 3, 4, 5])
    """

    ranks: int = 1
    ring: int = 1
    zigzag: bool = False

    @property
    def chunks(self) -> int:
        """A pack's tokens must be a multiple of this."""
        return 2 * self.ranks if self.zigzag and self.ring > 1 else self.ranks

    def order(self, tokens: int) -> Tensor:
        """The indices of the pack's tokens in the order in which ranks hold them, `[tokens]` int64: rank after rank."""
        index_T = torch.arange(tokens)
        if not (self.zigzag and self.ring > 1):
            return index_T
        halves = index_T.view(2 * self.ring, -1)
        return torch.cat([torch.cat([halves[i], halves[2 * self.ring - 1 - i]]) for i in range(self.ring)])

    def owner(self, place_N: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """For indices int64 `[N]` in a pack of so many tokens: the sequence rank that holds each, and its index in that
        rank's tokens, both int64 `[N]`.
        """
        at_N = place_N
        if self.zigzag and self.ring > 1:
            half = tokens // (2 * self.ring)
            chunk_N, within_N = place_N // half, place_N % half
            second_N = chunk_N >= self.ring
            ring_N = torch.where(second_N, 2 * self.ring - 1 - chunk_N, chunk_N)
            at_N = (2 * ring_N + second_N) * half + within_N
        local = tokens // self.ranks
        return at_N // local, at_N % local


def share(leaf: Tensor, rule: BatchRule, *, path: str, tokens: int, order: TokenOrder, mesh: Mesh, rank: int) -> Tensor:
    """What `rank` sees of a leaf (of any shape and dtype) of the whole mesh's batch, as `rule` says: a view or a copy.

    - `leaf`: of the whole batch, the packs of all data ranks one after the other.
    - `path`: what a message calls the leaf.
    - `tokens`: how many the whole batch has.
    - `order`: how the sequence axis shares a pack's tokens.
    - `mesh`, `rank`: the ranks, and the one that is asked for.

    ValueError names the leaf if it does not divide, if documents lie in two packs, or if a row's token is in the pack
    of another rank.

    >>> import torch
    >>> from ftrain.sharding import Mesh, Tokens
    >>> from ftrain.sharding.batch import TokenOrder, share
    >>> mesh, order = Mesh(shard=2, sequence=2, kind="virtual"), TokenOrder(ranks=2)
    >>> share(torch.arange(8), Tokens(), path="tokens", tokens=8, order=order, mesh=mesh, rank=3)
    tensor([6, 7])
    """
    data = mesh.replicate * mesh.shard
    if isinstance(rule, Replicated):
        return leaf
    if isinstance(rule, Offsets):
        by_pack = rule.of == "packs"
        number = rank // mesh.sequence if by_pack else rank
        return _offsets_share(leaf, rule.dim, path, data if by_pack else mesh.size, number)
    if isinstance(rule, Tokens):
        return _token_share(leaf, rule.dim, path, order, data, rank)
    dim = rule.dim if isinstance(rule, BatchRows) else 0
    if leaf.shape[dim] % mesh.size:
        raise ValueError(
            f"batch leaf {path!r}: {leaf.shape[dim]} rows (dim {dim}) do not divide over {mesh.size} ranks; pad to "
            f"{-(-leaf.shape[dim] // mesh.size) * mesh.size}, or say how it is divided in Plan(batch=...)"
        )
    length = leaf.shape[dim] // mesh.size
    own = leaf.narrow(dim, rank * length, length)
    return _in_pack(own, path, tokens, data, rank // mesh.sequence) if isinstance(rule, TokenIndices) else own


def require_whole_documents(ids: Tensor, *, path: str, dim: int, mesh: Mesh) -> None:
    """ValueError if a document of a whole batch lies in the packs of two data ranks.

    `ids`: an id for each token along `dim`, any shape. `path`: what the message calls the leaf.
    """
    data, tokens = mesh.replicate * mesh.shard, ids.shape[dim]
    if tokens % data:
        return
    rows = ids.movedim(dim, 0)
    for border in range(tokens // data, tokens, max(1, tokens // data)):
        if bool((rows[border - 1] == rows[border]).all()):
            raise ValueError(
                f"batch leaf {path!r}: a document (id {rows[border].flatten()[0]}) goes on over token {border}, where "
                f"the pack of another data rank begins: it would be cut in two. Pack documents so that none lies in "
                f"two of {data} packs (ftrain.modules.mesh_packing), or, if two documents share the id, give one "
                "another"
            )


def require_alike(entries: Mapping[str, int], paths: Collection[str], *, rules: str = "Plan(batch=...)") -> None:
    """ValueError, with a leaf, where leaves of which nobody says what they are have not all as many entries.

    `entries`: the length of the divided dim of each such leaf of one batch, by its path. The leaf that is named is the
    first whose length is not the most frequent one, of several the greatest. `paths`: of all leaves of the batch, which
    tell the ids of `Documents`, known to be of tokens. `rules`: where a rule can be given.
    """
    entries = {p: n for p, n in entries.items() if f"{p.rpartition('.')[0]}.offsets_N" not in paths}
    numbers = list(entries.values())
    if len(set(numbers)) < 2:
        return
    rows = max(numbers, key=lambda n: (numbers.count(n), n))
    like = next(path for path, n in entries.items() if n == rows)
    odd = next(path for path, n in entries.items() if n != rows)
    raise ValueError(
        f"batch leaf {odd!r} has {entries[odd]} entries and {like!r} has {rows}, and no rule says what they are: name "
        f"the leaf in {rules}, as ftrain.sharding.Replicated() where all of it is needed everywhere (a table, class "
        "weights, a scale), else as Tokens() or BatchRows()"
    )


def join_tokens(parts: list[Tensor], dim: int, order: TokenOrder) -> Tensor:
    """The inverse of `share` for `Tokens`: the whole leaf from the parts of all ranks, joined along `dim`."""
    packs = []
    for first in range(0, len(parts), order.ranks):
        held = torch.cat(parts[first : first + order.ranks], dim)
        packs.append(held.index_select(dim, order.order(held.shape[dim]).argsort()))
    return torch.cat(packs, dim)


def _token_share(leaf: Tensor, dim: int, path: str, order: TokenOrder, data: int, rank: int) -> Tensor:
    size = leaf.shape[dim] if leaf.dim() > dim else 0
    if leaf.dim() <= dim or size % (data * order.chunks):
        raise ValueError(
            f"batch leaf {path!r} of shape {list(leaf.shape)} does not split: dim {dim} must be a multiple of "
            f"{data} packs x {order.chunks} chunks = {data * order.chunks}; pack to such a budget, or say how the leaf "
            "is divided in Plan(batch={...})"
        )
    pack = leaf.narrow(dim, rank // order.ranks * (size // data), size // data)
    length = size // data // order.ranks
    if not (order.zigzag and order.ring > 1):
        return pack.narrow(dim, rank % order.ranks * length, length)
    mine = order.order(size // data)[rank % order.ranks * length :][:length]
    return pack.index_select(dim, mine.to(leaf.device))


def _offsets_share(leaf: Tensor, dim: int, path: str, parts: int, part: int) -> Tensor:
    """The offsets of one of equal parts of the batch, counted from its start."""
    places = leaf.shape[dim] - 1
    if places % parts:
        raise ValueError(
            f"batch leaf {path!r}: places for {places} documents do not divide over {parts} packs; make the documents "
            f"with Documents.of(ids, packs={parts})"
        )
    own = leaf.narrow(dim, places // parts * part, places // parts + 1)
    first, last = own.narrow(dim, 0, 1), own.narrow(dim, places // parts, 1)
    if leaf.device.type != "meta":
        end = leaf.narrow(dim, places, 1)
        if bool((first * parts != end * part).any() | (last * parts != end * (part + 1)).any()):
            raise ValueError(
                f"batch leaf {path!r}: the documents in the places of pack {part} are not those of its tokens; make "
                f"them with Documents.of(ids, packs={parts}), which refuses a document that lies in two packs"
            )
    return own - first


def _in_pack(place_n: Tensor, path: str, tokens: int, data: int, pack: int) -> Tensor:
    length = tokens // data
    local_n = place_n - pack * length
    nowhere_n = place_n == tokens
    if bool((~nowhere_n & ((local_n < 0) | (local_n >= length))).any()):
        raise ValueError(
            f"batch leaf {path!r}: a row of data rank {pack} stands at a token of another rank's pack; a pack's rows "
            "and its tokens must be in the same part of the batch"
        )
    return torch.where(nowhere_n, length, local_n)
