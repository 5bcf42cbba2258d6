"""Every layout of a step over a number of ranks: which are legal, and why the others are not."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ftrain.remat.policy import Remat
from ftrain.sharding.layout import Hybrid, Layout, Ring, Ulysses
from ftrain.sharding.mesh import Kind, Mesh

Attention = Ulysses | Ring | Hybrid


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model and its step that decide whether a layout is legal, and the least it costs.

    - `tokens`: of a pack, which the ranks of the sequence axis share; the longest document fits in one.
    - `packs`: of a step, over all ranks: every layout does the same work.
    - `layers`, `d_model`, `heads`, `kv_heads`, `head_dim`; `experts` and `top_k`, 0 without experts.
    - `weight_flops`: FLOPs of the forward and backward of one token in products with weights: 6 per weight used.
    - `attention_flops`: FLOPs of the forward and backward of one token in attention over its whole pack, not causal.
    - `causal`: whether most attention is causal: kernels then compute half of these.
    - `most_micro`: into how many micro-batches the step can be divided.
    """

    tokens: int
    packs: int
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    weight_flops: float
    attention_flops: float
    experts: int = 0
    top_k: int = 0
    causal: bool = True
    most_micro: int = 1 << 20


@dataclass(frozen=True)
class Candidate:
    """One layout: sizes of the mesh, how attention sees the pack, micro-batches, and what is recomputed.

    `attention`: None where the sequence axis is 1. `remat`: "none", "layer" (see `Remat`), or microseconds per MB.
    """

    replicate: int
    shard: int
    sequence: int
    expert: int
    attention: Attention | None
    micro_batches: int
    remat: str | float

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.replicate * self.shard * self.sequence

    @property
    def layout(self) -> Layout:
        """The default layout of its plan."""
        return Layout(sequence=self.attention or Ulysses())

    @property
    def recompute(self) -> Remat:
        """What is recomputed, as `ftrain.jit` takes it."""
        return Remat(self.remat) if isinstance(self.remat, str) else Remat(us_per_mb=float(self.remat))

    def mesh(self, kind: Kind | str = "fake") -> Mesh:
        """The mesh of its plan. ValueError for sizes that make no mesh."""
        return Mesh(self.replicate, self.shard, self.sequence, self.expert, kind)  # type: ignore[arg-type]

    def packs_at_once(self, model: ModelShape) -> int:
        """How many packs a data rank computes in one micro-batch."""
        return model.packs // (self.replicate * self.shard * self.micro_batches)

    def local_tokens(self, model: ModelShape) -> int:
        """Tokens of one rank in one micro-batch."""
        return model.tokens * self.packs_at_once(model) // self.sequence

    def __str__(self) -> str:
        how = "" if self.attention is None else f" {attention_name(self.attention)}"
        expert = f", expert {self.expert}" if self.expert > 1 else ""
        micro = f", {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        axes = f"replicate {self.replicate} x shard {self.shard} x sequence {self.sequence}{how}"
        return f"{axes}{expert}{micro}, remat {remat_name(self.remat)}"


class Rejected(NamedTuple):
    """Layouts that cannot run: what they have in common, their number, the reason, and what would fit.

    `needs`: bytes of a GPU that the smallest of them takes at least; 0 where memory is not the reason. `candidate`:
    that layout, where there is one.
    """

    what: str
    number: int
    reason: str
    fits: str = ""
    needs: float = 0.0
    candidate: Candidate | None = None


@dataclass(frozen=True)
class Space:
    """The choices that are tried.

    - `remats`: see `Candidate`. At 4 us/MB an H100 recomputes elementwise ops and keeps products; at 100 it recomputes
      products too, but not attention over long packs. "layer" recomputes all of these and gathers parameters once more.
    - `rings`: also ring attention and hybrids of both.
    - `most_micro`: the most micro-batches.
    """

    remats: tuple[str | float, ...] = ("none", 4.0, 100.0)
    rings: bool = True
    most_micro: int = 64


def layouts(ranks: int, model: ModelShape, space: Space = Space()) -> tuple[list[Candidate], list[Rejected]]:
    """Every legal layout of a step on `ranks` ranks, and the others with reasons.

    Two layouts differ if their programs do: axes of size 1 have no variants. ValueError for less than one rank, and for
    a space without a way to recompute.
    """
    if ranks < 1:
        raise ValueError(f"layouts for {ranks} ranks: there must be at least 1")
    if not space.remats:
        raise ValueError("Space(remats=()): name at least one of 'none', 'layer' or microseconds per MB")
    found: list[Candidate] = []
    rejected: list[Rejected] = []
    for replicate, shard in itertools.product(divisors(ranks), repeat=2):
        if ranks % (replicate * shard):
            continue
        sequence = ranks // (replicate * shard)
        axes = f"replicate {replicate} x shard {shard} x sequence {sequence}"
        data = replicate * shard
        ways, bad_ways = attention_ways(sequence, model, rings=space.rings)
        experts, bad_experts = expert_sizes(shard * sequence, model.experts)
        most = min(space.most_micro, model.most_micro)
        micros = [m for m in divisors(model.packs // data) if m <= most] if model.packs % data == 0 else []
        each = len(space.remats)
        if not micros:
            count = len(ways) * len(experts) * each
            rejected.append(Rejected(axes, count, _no_packs(model.packs, data), f"a multiple of {data} packs"))
            continue
        outer = len(micros) * each
        rejected += [Rejected(f"{axes} {name}", len(experts) * outer, why, fits) for name, why, fits in bad_ways]
        share = f"expert {_words(experts)}"
        rejected += [Rejected(f"{axes}, expert {n}", len(ways) * outer, why, share) for n, why in bad_experts]
        for way, expert, micro, remat in itertools.product(ways, experts, micros, space.remats):
            found.append(Candidate(replicate, shard, sequence, expert, way, micro, remat))
    return found, rejected


def attention_ways(
    sequence: int, model: ModelShape, *, rings: bool = True
) -> tuple[list[Attention | None], list[tuple[str, str, str]]]:
    """How attention can see a pack that `sequence` ranks share: the ways that fit the `model` (`[None]` for one rank),
    and (name, reason, what would fit) of each that does not. `rings`: include ring attention.
    """
    if sequence == 1:
        return [None], []
    ways: list[Attention] = [Ulysses()]
    if rings:
        ways += [Ring(), *(Hybrid(u) for u in divisors(sequence) if 1 < u < sequence)]
    good: list[Attention | None] = []
    bad = []
    for way in ways:
        why = _why_not(way, sequence, model)
        if why is None:
            good.append(way)
        else:
            bad.append((attention_name(way), *why))
    return good, bad


def _why_not(way: Attention, sequence: int, model: ModelShape) -> tuple[str, str] | None:
    """Why a way does not fit, and what would; None if it fits."""
    inner = _inner(way, sequence)
    if model.heads % inner:
        sizes = [n for n in divisors(sequence) if model.heads % n == 0]
        fits = f"ring attention, or Ulysses of {_words(sizes)} within a ring"
        return f"{model.heads} query heads do not divide over {inner} ranks of Ulysses", fits
    zigzag = sequence // inner > 1
    chunks = 2 * sequence if zigzag else sequence
    if model.tokens % chunks:
        fits = f"packs of a multiple of {chunks} tokens"
        return f"a pack of {model.tokens} tokens does not divide into {chunks} chunks", fits
    return None


def _words(numbers: Sequence[int]) -> str:
    """Numbers in words: `1, 2 or 4`."""
    *rest, last = map(str, numbers)
    return f"{', '.join(rest)} or {last}" if rest else last


def expert_sizes(ranks: int, experts: int) -> tuple[list[int], list[tuple[int, str]]]:
    """The numbers of ranks, of the `ranks` of a replica, over which the experts divide; and (number, reason) of those
    over which they do not.
    """
    if experts == 0:
        return [1], []
    sizes = divisors(ranks)
    bad = [n for n in sizes if experts % n]
    return [n for n in sizes if experts % n == 0], [(n, f"{experts} experts do not divide over {n} ranks") for n in bad]


def divisors(n: int) -> list[int]:
    """All divisors, ascending; none of 0."""
    low = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*low, *(n // i for i in low)})


def attention_name(way: Attention) -> str:
    """A short name: "ulysses", "ring", "hybrid 4" (Ulysses over 4 ranks within the ring)."""
    return {Ulysses: "ulysses", Ring: "ring"}.get(type(way)) or f"hybrid {_inner(way, 0)}"


def remat_name(remat: str | float) -> str:
    """A short name: "none", "layer", "4 us/MB"."""
    return remat if isinstance(remat, str) else f"{remat:g} us/MB"


def as_dict(candidate: Candidate) -> dict[str, Any]:
    """A layout as plain data; `from_dict` reads it."""
    way = None if candidate.attention is None else attention_name(candidate.attention)
    return {**asdict(candidate), "attention": way}


def from_dict(data: dict[str, Any]) -> Candidate:
    """The layout that `as_dict` wrote. ValueError names a key or an attention that is unknown.

    >>> from ftrain.plan.space import Candidate, as_dict, from_dict
    >>> layout = Candidate(replicate=1, shard=8, sequence=1, expert=1, attention=None, micro_batches=1, remat="none")
    >>> from_dict(as_dict(layout)) == layout, layout.ranks
    (True, 8)
    """
    names = set(Candidate.__dataclass_fields__)
    if set(data) != names:
        raise ValueError(f"a layout has the keys {sorted(names)}; got {sorted(data)}")
    return Candidate(**{**data, "attention": _attention_of(data["attention"])})


def _attention_of(name: str | None) -> Attention | None:
    if name is None:
        return None
    kind, _, inner = name.partition(" ")
    if kind == "hybrid" and inner.isdigit():
        return Hybrid(int(inner))
    ways: dict[str, Attention] = {"ulysses": Ulysses(), "ring": Ring()}
    if name not in ways:
        raise ValueError(f"attention {name!r} is not 'ulysses', 'ring' or 'hybrid N'")
    return ways[name]


def _inner(way: Attention, sequence: int) -> int:
    """Ranks of the Ulysses group."""
    if isinstance(way, Hybrid):
        return way.ulysses
    return sequence if isinstance(way, Ulysses) else 1


def _no_packs(packs: int, data: int) -> str:
    if packs < data:
        return f"{packs} packs in a step are fewer than replicate x shard = {data} data ranks"
    return f"{packs} packs in a step do not divide over replicate x shard = {data} data ranks"


def grouped(rejected: Sequence[Rejected]) -> Iterator[Rejected]:
    """Rejections with one reason joined, most numerous first; of those for memory the smallest is named."""
    by_reason: dict[str, list[Rejected]] = {}
    for r in rejected:
        by_reason.setdefault(r.reason, []).append(r)
    for reason, rows in sorted(by_reason.items(), key=lambda item: -sum(r.number for r in item[1])):
        least = min(rows, key=lambda r: r.needs)
        what = least.what if len(rows) == 1 else f"{least.what} and {len(rows) - 1} more"
        yield least._replace(what=what, number=sum(r.number for r in rows), reason=reason)
