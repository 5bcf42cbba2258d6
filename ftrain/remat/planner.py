"""Recompute by return on investment: the cheapest set of tensors to recompute so that the peak fits a budget.

At one exchange rate (microseconds per MB) the best set is a minimum cut (`remat.mincut`). The rate is moved until the
simulated peak fits, since fewer bytes kept do not always mean a lower peak. Then a local search (`remat.local_search`)
repairs what a cut cannot see. Where there is a link to the host, a tensor may also be offloaded (`remat.offload`), at
the price of the part of its copies that does not hide behind compute. All offloaded tensors share the link, so cuts are
also made for as much as it carries.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import fx

from ftrain.analysis.cuda_allocator import CUBLAS_WORKSPACE, reserved_over_allocated
from ftrain.analysis.hardware import device_bytes, free_bytes
from ftrain.analysis.liveness import input_bytes
from ftrain.analysis.op_times import OpTimes
from ftrain.remat.candidates import Recomputable
from ftrain.remat.local_search import Choice, Search
from ftrain.remat.mincut import cheapest_kept
from ftrain.remat.offload import CopySchedule, HostLink, OffloadPlanner, write_plan
from ftrain.remat.peak import PeakModel, Step
from ftrain.remat.policy import Remat, parse_budget
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.processes import same_everywhere

_SHARES_OF_LINK = (0.95, 0.5)  # shares of the link's time to fill, where more pays than it carries
_HEADROOM = 0.95  # share of the free memory that "fit" fills: the rest is for what no plan counts
_WORK_TO_IMPROVE = 250_000  # nodes to walk in the search around the cuts: about a second


@dataclass
class Planner:
    """Plans for one graph. Nodes are known by their number in `model.nodes`.

    - `donated`: from names of placeholders to the outputs written over them, as in `passes.donate`.
    - `round_to`: bytes to which the allocator rounds.
    - `link`: to the host; without one nothing is offloaded, not even what paths say.
    """

    module: fx.GraphModule
    donated: dict[str, int]
    times: OpTimes
    remat: Remat
    round_to: int = 1
    link: HostLink | None = None

    @cached_property
    def model(self) -> PeakModel:
        """The graph as numbers."""
        return PeakModel(self.module, self.donated, round_to=self.round_to)

    @cached_property
    def choices(self) -> Recomputable:
        """What may be recomputed, and what that costs and frees."""
        return Recomputable(self.module, self.model, self.times, self.remat)

    @cached_property
    def offloads(self) -> OffloadPlanner | None:
        """What may be offloaded; None without a link."""
        return None if self.link is None else OffloadPlanner(self.module, self.model, self.times, self.link)

    def at_rate(self, us_per_mb: float) -> Choice:
        """The best choice at one exchange rate, microseconds per MB; at 0 nothing is recomputed."""
        if us_per_mb <= 0:
            return self._priced(frozenset())
        return min(self._cuts(us_per_mb), key=lambda c: c.microseconds + us_per_mb * c.peak / 1e6)

    def _cuts(self, us_per_mb: float) -> Iterator[Choice]:
        """Minimum cuts: with nothing offloaded, with all that pays for itself, and with as much of that as the link
        carries.
        """
        yield self._cut(us_per_mb, frozenset())
        if self.offloads is None or not self._may_offload:
            return
        whole = self._cut(us_per_mb, self._may_offload)
        yield whole
        offloaded = sorted(self.parts(whole)[1] & self._may_offload)
        room = self.offloads.room(offloaded)
        for share in _SHARES_OF_LINK if room < 1 else ():
            yield self._cut(us_per_mb, _spread(offloaded, share * room))

    def _cut(self, us_per_mb: float, may_go: frozenset[int]) -> Choice:
        numbers, items, wanted = self.choices.items
        if self.offloads is not None and may_go:
            away = {v: self.offloads.price_alone(v) for v in may_go}
            items = [replace(i, away=away.get(v)) for v, i in zip(numbers, items, strict=True)]
        kept, recomputed = cheapest_kept(items, wanted, us_per_mb)
        offloaded = {self._token(numbers[v]) for v in kept if items[v].is_offloaded(us_per_mb)}
        return self._priced(frozenset({numbers[v] for v in recomputed} | offloaded))

    def within(self, peak: int) -> Choice:
        """The cheapest choice found whose simulated peak is at most `peak` bytes beyond the arguments. OverBudget names
        the smallest peak found if none fits.
        """
        nothing = self.at_rate(0.0)
        if nothing.peak <= peak:
            return nothing
        all_recomputed = frozenset(v for v, _, _ in self.choices.candidates)
        all_offloaded = frozenset(self._token(v) for v in self._may_offload)
        price = partial(self._priced, within=peak)
        starts = [
            *self._search(peak),
            *map(price, dict.fromkeys([all_recomputed, all_recomputed | all_offloaded, all_offloaded])),
        ]
        if all_offloaded:
            starts = [price(c.recomputed) if c.peak > peak else c for c in starts]
        tries = _WORK_TO_IMPROVE // len(self.model.nodes)
        ops = [*self.choices.ops, *(frozenset({offloaded}) for offloaded in sorted(all_offloaded))]
        found = Search(price, [*self.choices.candidates, *self._offload_choices], ops=ops, peak=peak, tries=tries).best(
            starts
        )
        if found.peak > peak:
            recomputed, _ = self.parts(found)
            places = found.table.places if found.table is not None else {}
            raise OverBudget(found.peak, self.model.nodes[self.model.peak(recomputed, places)[1]], found)
        return found

    def parts(self, choice: Choice) -> tuple[frozenset[int], frozenset[int]]:
        """The nodes that a choice recomputes, and those that it offloads."""
        count = len(self.model.nodes)
        return frozenset(v for v in choice.recomputed if v < count), frozenset(
            choice.table.places if choice.table else ()
        )

    def _token(self, v: int) -> int:
        """The number that stands for offloading a node in a set of nodes."""
        return len(self.model.nodes) + v

    @cached_property
    def _may_offload(self) -> frozenset[int]:
        """The nodes that are offloaded if that pays."""
        if self.offloads is None or self.remat.offload is None:
            return frozenset()
        return frozenset(v for v in self.offloads.views if self.choices.path_choice(v) is None)

    @cached_property
    def _must_offload(self) -> frozenset[int]:
        """The nodes that are offloaded because of their path."""
        if self.offloads is None:
            return frozenset()
        return frozenset(v for v in self.offloads.views if self.choices.path_choice(v) == "offload")

    @cached_property
    def _offload_choices(self) -> list[tuple[int, float, int]]:
        """What may be offloaded, as candidates of a search."""
        if self.offloads is None:
            return []
        return [
            (self._token(v), self.offloads.price_alone(v), self.offloads.bytes(v)) for v in sorted(self._may_offload)
        ]

    def _search(self, peak: int) -> Iterator[Choice]:
        nothing = self.at_rate(0.0)
        yield nothing
        low, high = self.choices.rates
        grid = [low * (high / low) ** (i / 12) for i in range(13)]
        peaks = {0.0: nothing.peak}
        for rate in grid:
            choice = self.at_rate(rate)
            peaks[rate] = choice.peak
            yield choice
            if choice.peak <= peak:
                break
        yield from self._refined(peaks, peak)

    def _refined(self, peaks: dict[float, int], peak: int) -> Iterator[Choice]:
        """Rates between the last that does not fit and the first that does; if none fits, around the lowest peak."""
        rates = sorted(peaks)
        best = min(rates, key=lambda r: (peaks[r] > peak, peaks[r]))
        at = rates.index(best)
        below, above = rates[max(0, at - 1)], rates[min(len(rates) - 1, at + 1)]
        if peaks[best] > peak:
            low = max(below, best / 64, 1e-3)
            for i in range(1, 12):
                yield self.at_rate(low * (max(above, best) / low) ** (i / 12))
            return
        above = best
        for _ in range(10):
            middle = math.sqrt(max(below, above / 64) * above)
            choice = self.at_rate(middle)
            yield choice
            below, above = (below, middle) if choice.peak <= peak else (middle, above)

    def _priced(self, recomputed: frozenset[int], within: int | None = None) -> Choice:
        """The choice for a set. Copies from and to the host hide as far as they can while the peak is at most
        `within`.
        """
        count = len(self.model.nodes)
        offloaded = {v - count for v in recomputed if v >= count} | self._must_offload
        if self.offloads is None or not offloaded:
            used = _read_by_recompute(self.model.steps, recomputed)
            return Choice(used, self.model.peak(used)[0], sum(self.choices.microseconds[v] for v in sorted(used)))
        views = {u for v in offloaded for u in self.offloads.views[v]}
        wanted = frozenset({v for v in recomputed if v < count} - offloaded | views)
        needed = self.offloads.needed(offloaded, wanted)
        used = _read_by_recompute(self.model.steps, wanted)
        microseconds = sum(self.choices.microseconds[v] for v in sorted(used))
        tokens = used | {self._token(v) for v in needed}

        def choice(table: CopySchedule) -> Choice:
            return Choice(tokens, self.model.peak(used, table.places)[0], microseconds + table.total, table)

        found = choice(self.offloads.schedule(needed))
        if within is None or found.peak <= within:
            return found
        return min(found, choice(self.offloads.schedule(needed, tight=True)), key=lambda c: c.peak)


def write_choice(planner: Planner, choice: Choice) -> None:
    """Write the copies of a choice into the graph of the planner; no value changes."""
    write_plan(planner.model, planner.parts(choice)[0], choice.table.places if choice.table is not None else {})


def _read_by_recompute(steps: Sequence[Step], recomputed: frozenset[int]) -> frozenset[int]:
    """The nodes of the set that the backward reads, or from which others of these are recomputed."""
    stack = [u for s in steps if not s.forward for u in s.reads if u in recomputed]
    found: set[int] = set()
    while stack:
        v = stack.pop()
        if v not in found:
            found.add(v)
            stack.extend(u for u in steps[v].reads if u in recomputed)
    return frozenset(found)


def _spread(nodes: list[int], share: float) -> frozenset[int]:
    """A share of the nodes, at equal distances."""
    count = int(share * len(nodes))
    return frozenset(nodes[int((i + 0.5) * len(nodes) / count)] for i in range(count))


class OverBudget(ValueError):
    """No choice fits.

    `smallest`: bytes beyond the arguments that the smallest choice takes; `choice`: that one; `node`: where its peak
    is.
    """

    def __init__(self, smallest: int, node: fx.Node, choice: Choice) -> None:
        super().__init__(f"at least {smallest} bytes beyond the arguments, at {node.name}")
        self.smallest, self.node, self.choice = smallest, node, choice


def budget_bytes(remat: Remat, device: torch.device, inputs: int) -> int:
    """The budget of `remat` in bytes, arguments included.

    "fit" is the memory that is free now plus `inputs` (the bytes of the arguments, which are there already), less what
    the allocator reserves beyond a plan (on CUDA, see `ftrain.analysis.cuda_allocator`), cuBLAS's workspace and a
    margin of a few percent. Bytes and shares of the device are taken as they are.
    """
    assert remat.budget is not None
    parsed = parse_budget(remat.budget)
    if parsed == "fit":
        return inputs + _usable(free_bytes(device), device)
    return int(parsed * device_bytes(device)) if isinstance(parsed, float) else int(parsed)


def bytes_within(module: fx.GraphModule, remat: Remat, device: torch.device, mesh: Mesh | None) -> int | None:
    """Bytes beyond the arguments of the graph `module` that recompute and overlap share: the budget of `remat`; without
    one, what is free on the GPU `device`. All ranks of `mesh` get the same number.

    None on a CPU without a budget, since ranks share its memory.
    """
    if remat.budget is None and device.type != "cuda":
        return None
    inputs = input_bytes(module)
    wanted = remat if remat.budget is not None else replace(remat, budget="fit")
    return same_everywhere(budget_bytes(wanted, device, inputs), mesh) - inputs


def _usable(free: int, device: torch.device) -> int:
    """Of so many free bytes, those that a plan may fill."""
    if device.type != "cuda":
        return int(_HEADROOM * free)
    return int(min(_HEADROOM, 1 / reserved_over_allocated()) * max(0, free - CUBLAS_WORKSPACE))
