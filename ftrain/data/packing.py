"""Which documents share a pack: all packs of one step at once, full and of about equal cost. Pure functions of sizes.

A *group* is what one row became: documents that lie in one pack. Groups wait in a buffer, the oldest first; a step
takes what fills its packs best, always with the oldest, and leaves the rest for later steps. A group that costs much
more than the other packs of its step would make all ranks wait for the one that has it. It waits for a few steps, so
that such groups come together.

Legend: N groups of the buffer, P packs of a step, T tokens of a pack, R ranks, M micro-batches.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from ftrain.data.cost import Cost, CostOf

PATIENCE = 16
"""Steps that a group which costs too much for the packs of a step waits for others like it, unless told otherwise."""
TOLERANCE = 0.015
"""How much more than the mean pack a pack may cost, as a part of it, before its largest group waits."""

_STEPS_AHEAD = 4
_LEAST_BUFFER = 2**16
_LEAST_HELD = 2**15
_SHORT = 32  # tokens: a buffer full of documents shorter than this holds fewer tokens than it may
_TAKEN_BY_AGE = 0.97  # of the tokens of a step; the rest fills gaps with what fits best, whatever its age


@dataclass(frozen=True)
class Packing:
    """How documents become the packs of a step.

    - `tokens`: T, the budget of a pack.
    - `ranks`, `micro_batches`: data ranks, and packs of each of them in a step. Runs with the same R * M train on the
      same packs in each step.
    - `cut`: "never", or "split": a document longer than T becomes pieces. `too_long`: what else such a document is,
      a row that is rejected or an "error".
    - `cost`: of documents, for packs of equal cost (`ftrain.data.cost`); a group that says its own has that one.
    - `buffer`: tokens that wait to be packed, None: those of 4 steps, and 65,536 at least.
    - `held`: groups that wait at most, for which a position has room; None: 32,768, and more with a larger buffer. Runs
      on other numbers of ranks restore each other's positions where it is the same.
    - `patience`, `tolerance`: when a costly group waits for others like it, as in `plan_packs`.

    ValueError for sizes below 1, and words that are none of these.
    """

    tokens: int
    ranks: int = 1
    micro_batches: int = 1
    cut: Literal["never", "split"] = "never"
    too_long: Literal["reject", "error"] = "reject"
    cost: CostOf = field(default_factory=lambda: Cost.of_width(2048))
    buffer: int | None = None
    held: int | None = None
    patience: int = PATIENCE
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        """ValueError for sizes below 1, and words that are none of these."""
        for name in ("tokens", "ranks", "micro_batches", "held"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Packing: {name}={value} must be at least 1")
        for name, known in (("cut", ("never", "split")), ("too_long", ("reject", "error"))):
            if getattr(self, name) not in known:
                raise ValueError(f"Packing: {name}={getattr(self, name)!r} is none of {', '.join(map(repr, known))}")
        if self.buffer is not None and self.buffer < self.tokens * self.packs:
            raise ValueError(
                f"Packing: a buffer of {self.buffer} tokens does not fill the {self.packs} packs of {self.tokens} "
                f"tokens of a step: give at least {self.tokens * self.packs}"
            )

    @property
    def packs(self) -> int:
        """P, the packs of a step."""
        return self.ranks * self.micro_batches

    @property
    def waiting(self) -> int:
        """Tokens that wait to be packed."""
        return self.buffer or max(_STEPS_AHEAD * self.tokens * self.packs, _LEAST_BUFFER)

    @property
    def capacity(self) -> int:
        """The most groups that wait, for which a position has room."""
        return self.held or max(_LEAST_HELD, 1 << (self.waiting // _SHORT - 1).bit_length())


class Shape(NamedTuple):
    """What each pack of a step is: one pack of `length` tokens, or so many `rows` of them; in each pack or row `media`
    tokens of each kind of media, with those that fill it up.
    """

    length: int
    rows: int = 0
    media: tuple[int, ...] = ()

    @property
    def places(self) -> int:
        """Tokens of a pack, with its padding."""
        return self.length * max(self.rows, 1)

    def __str__(self) -> str:
        media = "".join(f", {n} of them of media" for n in self.media if n)
        return f"{self.rows} x {self.length}{media}" if self.rows else f"{self.length}{media}"


class Plan(NamedTuple):
    """`pack_N`: int64, the pack of each group, -1 for one that waits. Of each pack: `tokens_P` int64 that are no
    padding, and `cost_P` float64, in which padding counts as tokens of the cheapest kind. `shape`: of each.
    """

    pack_N: np.ndarray
    tokens_P: np.ndarray
    cost_P: np.ndarray
    shape: Shape


def plan_packs(
    lengths_N: np.ndarray,
    costs_N: np.ndarray,
    *,
    tokens: int,
    packs: int,
    waited_N: np.ndarray | None = None,
    patience: int = PATIENCE,
    tolerance: float = TOLERANCE,
) -> Plan:
    """The packs of the next step, from groups in a buffer.

    The result depends on the arguments alone: how many ranks share the packs, and who plans, does not enter.

    Args:
        lengths_N: int64, tokens of each group, the oldest first; each is at least 1 and at most `tokens`.
        costs_N: float64, what each costs (`ftrain.data.cost`), above 0.
        tokens: T, the budget of a pack.
        packs: P.
        waited_N: int64, for how many steps each has waited; None: none has.
        patience: after this many steps a costly group waits no more; 0: none ever waits.
        tolerance: a group waits if a pack with it costs more than the mean pack by this part of it.

    Raises:
        ValueError: arrays of unlike shapes, a group without tokens or above the budget, or no pack.

    >>> plan = plan_packs(np.array([5, 3, 4, 2]), np.array([5.0, 3.0, 4.0, 2.0]), tokens=8, packs=2)
    >>> plan.pack_N.tolist(), plan.tokens_P.tolist()
    ([0, 0, 1, 1], [8, 6])
    """
    lengths_N, costs_N = np.asarray(lengths_N, np.int64), np.asarray(costs_N, np.float64)
    waited_N = np.zeros(len(lengths_N), np.int64) if waited_N is None else np.asarray(waited_N, np.int64)
    _check(lengths_N, costs_N, waited_N, tokens, packs)
    if not len(lengths_N):
        return Plan(np.zeros(0, np.int64), np.zeros(packs, np.int64), np.zeros(packs), Shape(tokens))
    floor = float((costs_N / lengths_N).min())
    extra_N = costs_N - floor * lengths_N
    step = _Step(tokens, packs, floor, patience, tolerance)
    allowed_N, first_N = _allowed(lengths_N, extra_N, waited_N, step)
    filling = _Filling(lengths_N, extra_N, tokens, packs)
    filling.spread(_by_age(lengths_N, allowed_N, first_N, int(tokens * packs * _TAKEN_BY_AGE)))
    filling.fill_gaps(allowed_N)
    return Plan(filling.pack_N, tokens - filling.room_P, floor * tokens + filling.extra_P, Shape(tokens))


class _Step(NamedTuple):
    """What `plan_packs` is asked for; `floor`: the cost of a token of the cheapest group."""

    tokens: int
    packs: int
    floor: float
    patience: int
    tolerance: float


def _check(lengths_N: np.ndarray, costs_N: np.ndarray, waited_N: np.ndarray, tokens: int, packs: int) -> None:
    if packs < 1 or tokens < 1:
        raise ValueError(f"plan_packs: {packs} packs of {tokens} tokens: both must be at least 1")
    if not (lengths_N.shape == costs_N.shape == waited_N.shape) or lengths_N.ndim != 1:
        shapes = ", ".join(str(list(a.shape)) for a in (lengths_N, costs_N, waited_N))
        raise ValueError(f"plan_packs: lengths, costs and waited have shapes {shapes}, not one [N]")
    if len(lengths_N) and not (lengths_N.min() > 0 and lengths_N.max() <= tokens and costs_N.min() > 0):
        raise ValueError(
            f"plan_packs: groups have {lengths_N.min()} to {lengths_N.max()} tokens and cost at least "
            f"{costs_N.min():g}: they must have 1 to {tokens} tokens, the budget of a pack, and a cost above 0"
        )


def _costly(lengths_N: np.ndarray, extra_N: np.ndarray, step: _Step) -> np.ndarray:
    """Numbers of the groups that packs of all cheaper ones could not match in cost, the cheapest of them first."""
    order = np.argsort(extra_N, kind="stable")
    mean = step.tokens * np.cumsum(extra_N[order]) / np.cumsum(lengths_N[order])
    matched = extra_N[order] <= mean + step.tolerance * (step.floor * step.tokens + mean)
    return order[len(order) if matched.all() else int(np.argmin(matched)) :]


def _allowed(
    lengths_N: np.ndarray, extra_N: np.ndarray, waited_N: np.ndarray, step: _Step
) -> tuple[np.ndarray, np.ndarray]:
    """Which groups this step may take, and which of them it takes first, whatever their age.

    Costly groups are taken when one of them has waited long enough, when each pack can have one, or when the others do
    not fill a step; then as many as there are packs, the costliest or those that begin with the one that waited.
    """
    everything, none = np.ones(len(lengths_N), bool), np.zeros(len(lengths_N), bool)
    if step.patience < 1 or step.packs == 1:
        return everything, none
    costly = _costly(lengths_N, extra_N, step)
    if lengths_N.sum() - lengths_N[costly].sum() < step.tokens * step.packs:
        return everything, none
    late = np.flatnonzero(waited_N[costly] >= step.patience)
    allowed, first = everything, none
    allowed[costly] = False
    if len(late) or len(costly) >= step.packs:
        start = max(0, len(costly) - step.packs)
        start = min(start, int(late[-1])) if len(late) else start
        first[costly[start : start + step.packs]] = True
    return allowed | first, first


def _by_age(lengths_N: np.ndarray, allowed_N: np.ndarray, first_N: np.ndarray, tokens: int) -> np.ndarray:
    """Numbers of groups that have about so many tokens: those that come first, then the oldest; one at least."""
    numbers = np.concatenate([np.flatnonzero(first_N), np.flatnonzero(allowed_N & ~first_N)])
    count = int(np.searchsorted(np.cumsum(lengths_N[numbers]), tokens, side="right"))
    return numbers[: max(1, count)]


class _Filling:
    """Packs as they fill: `pack_N`, `room_P` tokens left in each, `extra_P` what each costs above its tokens."""

    def __init__(self, lengths_N: np.ndarray, extra_N: np.ndarray, tokens: int, packs: int) -> None:
        self.lengths_N, self.extra_N = lengths_N, extra_N
        self.pack_N = np.full(len(lengths_N), -1, np.int64)
        self.room_P, self.extra_P = np.full(packs, tokens, np.int64), np.zeros(packs)

    def _put(self, numbers: np.ndarray, packs: np.ndarray) -> None:
        """Groups into packs of which no two are the same."""
        self.pack_N[numbers] = packs
        self.room_P[packs] -= self.lengths_N[numbers]
        self.extra_P[packs] += self.extra_N[numbers]

    def spread(self, numbers: np.ndarray) -> None:
        """Give these groups to packs: the costliest first, one to each pack in turn, the costliest to the cheapest."""
        packs, oldest = len(self.room_P), numbers[:1]
        if packs == 1 and self.lengths_N[numbers].sum() <= self.room_P[0]:
            self.pack_N[numbers] = 0
            self.room_P -= self.lengths_N[numbers].sum()
            self.extra_P += self.extra_N[numbers].sum()
            return
        self._put(oldest, np.zeros(1, np.int64))
        rest = numbers[1:]
        rest = rest[np.lexsort((-self.lengths_N[rest], -self.extra_N[rest]))]
        for start in range(0, len(rest), packs):
            turn = rest[start : start + packs]
            cheapest = np.lexsort((-self.room_P, self.extra_P))[: len(turn)]
            fits = self.lengths_N[turn] <= self.room_P[cheapest]
            self._put(turn[fits], cheapest[fits])
        for number in rest[self.pack_N[rest] < 0]:
            extra_P = np.where(self.room_P >= self.lengths_N[number], self.extra_P, np.inf)
            pack = int(np.argmin(extra_P))
            if extra_P[pack] < np.inf:
                self._put(np.array([number]), np.array([pack]))

    def fill_gaps(self, allowed_N: np.ndarray) -> None:
        """Fill what room is left with the longest groups that fit, from the cheapest pack on."""
        numbers = np.flatnonzero(allowed_N & (self.pack_N < 0))
        numbers = numbers[np.argsort(self.lengths_N[numbers], kind="stable")]
        left, lengths = numbers.tolist(), self.lengths_N[numbers].tolist()
        for pack in np.lexsort((-self.room_P, self.extra_P)).tolist():
            room = int(self.room_P[pack])
            taken = []
            while lengths and lengths[0] <= room:
                at = bisect_right(lengths, room) - 1
                room -= lengths.pop(at)
                taken.append(left.pop(at))
            if taken:
                self.pack_N[taken] = pack
                self.room_P[pack] = room
                self.extra_P[pack] += self.extra_N[taken].sum()


def deal_packs(cost_P: np.ndarray, *, ranks: int, micro_batches: int = 1) -> np.ndarray:
    """Which pack each rank computes in each micro-batch: int64 `[R, M]`.

    Ranks wait for each other in every micro-batch, so the packs of one cost alike: the R costliest are the first
    micro-batch. Within it the order turns from one micro-batch to the next, so that the sums of ranks are alike too.

    Args:
        cost_P: float64, of each pack; P is R times M.

    Raises:
        ValueError: there are more or fewer packs.

    >>> deal_packs(np.array([1.0, 4.0, 3.0, 2.0]), ranks=2, micro_batches=2).tolist()
    [[1, 0], [2, 3]]
    """
    if ranks < 1 or micro_batches < 1 or len(cost_P) != ranks * micro_batches:
        raise ValueError(f"{len(cost_P)} packs are not {micro_batches} micro-batches of {ranks} ranks")
    turns = np.argsort(-cost_P, kind="stable").reshape(micro_batches, ranks)
    turns[1::2] = turns[1::2, ::-1]
    return np.ascontiguousarray(turns.T)
