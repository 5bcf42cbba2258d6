"""What a search finds: prices of layouts that fit, and why others do not, with what would fit instead."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ftrain.analysis.cluster import CLUSTERS
from ftrain.graph.text import show_bytes
from ftrain.plan.cost import Price
from ftrain.plan.estimate import Estimate
from ftrain.plan.space import Candidate, ModelShape, Rejected


@dataclass
class Outcomes:
    """What was found so far: `prices` that fit into `limit` bytes of a GPU, `rejected` layouts, and those that were far
    `too_large`.

    `beyond`: for each way to recompute, the least factor by which traced memory exceeded its estimate.
    """

    limit: float
    rejected: list[Rejected]
    prices: list[Price] = field(default_factory=list)
    too_large: list[tuple[Candidate, Estimate, int]] = field(default_factory=list)
    beyond: dict[str | float, float] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The limit in words."""
        return show_bytes(int(self.limit))

    def refuse_before_trace(self, candidate: Candidate, needs: float) -> None:
        """Note a layout whose estimate (`needs`, bytes) alone exceeds the limit."""
        reason = f"needs more than the {self.shown} of a GPU for its state and what it keeps"
        self.rejected.append(Rejected(str(candidate), 1, reason, needs=needs, candidate=candidate))

    def enter(self, candidate: Candidate, guess: Estimate, outcome: Price | str, model: ModelShape) -> None:
        """Note the outcome of tracing `candidate`: its price, or a text that says why it cannot be lowered. `guess`:
        its estimate; `model`: whose step it is a layout of.
        """
        if isinstance(outcome, str):
            self.rejected.append(Rejected(str(candidate), 1, outcome))
            return
        ratio = outcome.peak / guess.memory
        self.beyond[candidate.remat] = min(ratio, self.beyond.get(candidate.remat, ratio))
        if outcome.peak > self.limit:
            reason = f"traced, it needs more than the {self.shown} of a GPU"
            self.rejected.append(Rejected(str(candidate), 1, reason, needs=outcome.peak, candidate=candidate))
            if outcome.peak > 1.1 * self.limit:
                self.too_large.append((candidate, guess, candidate.local_tokens(model)))
        else:
            self.prices.append(outcome)

    def expected(self, candidate: Candidate, guess: Estimate) -> float:
        """Bytes that `candidate` is likely to need: its estimate `guess`, corrected by traces of similar layouts."""
        return guess.memory * self.beyond.get(candidate.remat, 1.0)

    def hopeless(self, candidate: Candidate, guess: Estimate, model: ModelShape) -> bool:
        """True for a `candidate` that holds no less than a layout that was far too large, and recomputes no more; it is
        then rejected. `guess`: its estimate; `model`: whose step it is.
        """
        tokens = candidate.local_tokens(model)
        for other, needed, held in self.too_large:
            if other.remat == candidate.remat and tokens >= held and guess.memory >= 0.9 * needed.memory:
                reason = f"holds no less than {other}, which needs more than the {self.shown} of a GPU"
                needs = self.expected(candidate, guess)
                self.rejected.append(Rejected(str(candidate), 1, reason, needs=needs, candidate=candidate))
                return True
        return False


def with_ways_out(rejected: Sequence[Rejected], prices: Sequence[Price], share: float) -> list[Rejected]:
    """The same rejections; those for memory name the layout of `prices` that is nearest to them, or a GPU that holds
    them.

    `share`: of a GPU's memory, what a step may use.
    """
    return [r._replace(fits=_way_out(r, prices, share)) if r.needs and r.candidate else r for r in rejected]


def _way_out(rejected: Rejected, prices: Sequence[Price], share: float) -> str:
    needs = f"it needs {show_bytes(int(rejected.needs))}"
    if rejected.candidate is not None and prices:
        near = max(prices, key=lambda p: _alike(p.candidate, rejected.candidate))
        return f"{needs}; {near.candidate} needs {show_bytes(int(near.peak))}"
    roomy = [name for name, make in CLUSTERS.items() if share * make().memory >= rejected.needs]
    return f"{needs}: {f'a GPU like {roomy[0]}' if roomy else 'more GPUs, fewer tokens, or more recompute'}"


def _alike(one: Candidate, other: Candidate | None) -> int:
    """The number of choices in which two layouts agree."""
    return sum(getattr(one, name) == getattr(other, name) for name in Candidate.__dataclass_fields__)
