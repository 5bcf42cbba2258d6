"""Packs of a step that are alike in several costs at once: what encoders compute of their media, and what the decoder
does. Pure functions of sizes.

Ranks wait for each other where encoders end and where the decoder does, so a pack that makes up for many pictures by
few tokens does not help. A plan that is even in one cost (`ftrain.data.packing`) is made even in all of them: the
costliest pack gives a group to another pack, or to those that wait, for one of theirs or for none.

Legend: N groups, P packs, K costs, T tokens of a pack, n groups of one pack, m groups that may be taken for them.
"""

from dataclasses import dataclass

import numpy as np

from ftrain.data.packing import Plan

TOLERANCE = 0.01
"""How much more than the mean pack a pack may cost, as a part of it, before its groups are exchanged."""
_MOST = 4  # exchanges for each pack, after which a step stays as it is
_PARTNERS = 8  # packs that the costliest one exchanges groups with: the cheapest in what it has too much of
_LOW = 0.5  # how far a pack below the mean is from it, over one above: it makes fewer wait
_WAITING = 256  # groups, the oldest of those that wait, that it exchanges its own for


def even_plan(plan: Plan, lengths_N: np.ndarray, costs_NK: np.ndarray, late_N: np.ndarray) -> Plan:
    """A plan of packs that is even in several costs, of which the first is that of the plan.

    `lengths_N`, `costs_NK`: as in `evened`. `late_N`: bool, groups that wait no more. The oldest of all stays too.
    """
    packs, tokens = len(plan.tokens_P), plan.shape.length
    if packs < 2 or not len(lengths_N):
        return plan
    kept_N = late_N.copy()
    kept_N[0] = True
    pack_N = evened(plan.pack_N, lengths_N, costs_NK, tokens=tokens, packs=packs, kept_N=kept_N)
    there, floor = pack_N >= 0, float((costs_NK[:, 0] / lengths_N).min())
    tokens_P, cost_P = np.zeros(packs, np.int64), np.full(packs, floor * tokens)
    np.add.at(tokens_P, pack_N[there], lengths_N[there])
    np.add.at(cost_P, pack_N[there], (costs_NK[:, 0] - floor * lengths_N)[there])
    return plan._replace(pack_N=pack_N, tokens_P=tokens_P, cost_P=cost_P)


def evened(
    pack_N: np.ndarray,
    lengths_N: np.ndarray,
    costs_NK: np.ndarray,
    *,
    tokens: int,
    packs: int,
    kept_N: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> np.ndarray:
    """The pack of each group, int64 `[N]`, -1 for one that waits, after exchanges that make packs even in each cost.

    Each exchange lowers what the costliest of two packs costs above the mean, in the cost where this is most; then what
    room is left is filled. `tokens` is never exceeded.

    Args:
        pack_N: int64, the packs to begin with.
        lengths_N: int64, tokens of each group.
        costs_NK: float64, what each group costs of every kind, at least 0.
        tokens: T. packs: P.
        kept_N: bool, groups that stay in the step; None: the oldest one, which is the first.
        tolerance: packs this near to the mean, as a part of it, are even.

    >>> lengths, costs = np.array([4, 4, 4, 4]), np.array([[4.0, 4], [4, 4], [4, 0], [4, 0]])
    >>> evened(np.array([0, 0, 1, 1]), lengths, costs, tokens=8, packs=2).tolist()
    [0, 1, 0, 1]
    """
    filled = _Packs.of(pack_N, lengths_N, costs_NK, tokens, packs)
    kept_N = np.arange(len(lengths_N)) == 0 if kept_N is None else kept_N
    stuck = np.zeros(packs, bool)
    for _ in range(_MOST * packs):
        above_PK = filled.above()
        pack = int(np.argmax(np.where(stuck, -np.inf, _height(1 + above_PK))))
        if above_PK.max() <= tolerance or stuck[pack]:
            break
        if filled.exchange(pack, above_PK, kept_N):
            stuck[:] = False
        else:
            stuck[pack] = True
    filled.fill()
    return filled.pack_N


@dataclass
class _Packs:
    """Packs and what they hold: `pack_N`, tokens `used_P`, and `cost_PK` in units of the mean pack."""

    pack_N: np.ndarray
    lengths_N: np.ndarray
    costs_NK: np.ndarray
    tokens: int
    used_P: np.ndarray
    cost_PK: np.ndarray

    @staticmethod
    def of(pack_N: np.ndarray, lengths_N: np.ndarray, costs_NK: np.ndarray, tokens: int, packs: int) -> "_Packs":
        there = pack_N >= 0
        total_K = costs_NK[there].sum(0)
        scaled_NK = costs_NK * np.divide(packs, total_K, out=np.zeros(len(total_K)), where=total_K > 0)
        used_P, cost_PK = np.zeros(packs, np.int64), np.zeros((packs, costs_NK.shape[1]))
        np.add.at(used_P, pack_N[there], lengths_N[there])
        np.add.at(cost_PK, pack_N[there], scaled_NK[there])
        return _Packs(pack_N.copy(), lengths_N, scaled_NK, tokens, used_P, cost_PK)

    def above(self) -> np.ndarray:
        """What each pack costs above the mean one, as a part of it, `[P, K]`."""
        mean_K = self.cost_PK.mean(0)
        return np.divide(self.cost_PK, mean_K, out=np.ones_like(self.cost_PK), where=mean_K > 0) - 1

    def exchange(self, pack: int, above_PK: np.ndarray, kept_N: np.ndarray) -> bool:
        """Make the best exchange of a group of this pack; False where none makes it better."""
        mine_n = np.flatnonzero((self.pack_N == pack) & ~kept_N)
        most = int(np.argmax(np.maximum(above_PK[pack], -_LOW * above_PK[pack])))
        sign = 1 if above_PK[pack, most] > 0 else -1
        partners = np.argsort(sign * above_PK[:, most], kind="stable")[:_PARTNERS]
        near_N = np.isin(self.pack_N, partners[partners != pack]) & ~kept_N
        waiting = np.flatnonzero(self.pack_N < 0)[:_WAITING]
        theirs_m = np.concatenate([np.flatnonzero(near_N), waiting])
        if not len(mine_n):
            return False
        alone = partners[partners != pack]  # a pack that gives nothing for what it gets
        other_m = np.concatenate([self.pack_N[theirs_m], alone, [-1]])
        length_m = np.concatenate([self.lengths_N[theirs_m], np.zeros(len(alone) + 1, np.int64)])
        cost_mK = np.concatenate([self.costs_NK[theirs_m], np.zeros((len(alone) + 1, above_PK.shape[1]))])
        worse_nm = self._worse(pack, mine_n, other_m, length_m, cost_mK)
        best = int(np.argmin(worse_nm))
        row, column = divmod(best, len(other_m))
        if worse_nm[row, column] >= _height(self.cost_PK[pack]) - 1e-9:
            return False
        self._move(int(mine_n[row]), int(other_m[column]))
        if column < len(theirs_m):
            self._move(int(theirs_m[column]), pack)
        return True

    def fill(self) -> None:
        """Fill the room that is left with groups that wait, the longest that fit first, where packs stay as even."""
        most = float(self.cost_PK.max() - 1)
        waiting = np.flatnonzero(self.pack_N < 0)
        for group in waiting[np.argsort(-self.lengths_N[waiting], kind="stable")].tolist():
            room_P = self.tokens - self.used_P
            if self.lengths_N[group] > room_P.max():
                continue
            higher_P = (self.cost_PK + self.costs_NK[group] - 1).max(1)
            higher_P[room_P < self.lengths_N[group]] = np.inf
            pack = int(np.argmin(higher_P))
            if higher_P[pack] <= most:
                self._move(group, pack)

    def _worse(
        self, pack: int, mine_n: np.ndarray, other_m: np.ndarray, length_m: np.ndarray, cost_mK: np.ndarray
    ) -> np.ndarray:
        """The height of the higher of both packs after each exchange, `[n, m]`; infinite where one has no room."""
        more_nm = self.lengths_N[mine_n, None] - length_m
        cost_nmK = self.costs_NK[mine_n, None] - cost_mK
        in_step_m = other_m >= 0
        fits_nm = (self.used_P[pack] - more_nm <= self.tokens) & (
            ~in_step_m | (self.used_P[other_m] + more_nm <= self.tokens)
        )
        here_nm = _height(self.cost_PK[pack] - cost_nmK)
        there_nm = np.where(in_step_m, _height(self.cost_PK[other_m] + cost_nmK), 0.0)
        # of exchanges that are as good, one that leaves nothing out of the step
        found_nm = np.maximum(here_nm, there_nm) + np.where(in_step_m, 0.0, 1e-3)
        return np.where(fits_nm, found_nm, np.inf)

    def _move(self, group: int, pack: int) -> None:
        for place, sign in ((int(self.pack_N[group]), -1), (pack, 1)):
            if place >= 0:
                self.used_P[place] += sign * self.lengths_N[group]
                self.cost_PK[place] += sign * self.costs_NK[group]
        self.pack_N[group] = pack


def _height(cost_K: np.ndarray) -> np.ndarray:
    """How far packs are from the mean, the more where they are above it. `cost_K`: in units of the mean, `[..., K]`."""
    height: np.ndarray = np.maximum(cost_K - 1, _LOW * (1 - cost_K)).max(-1)
    return height
