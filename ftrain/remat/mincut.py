"""Which tensors to keep for the backward pass, at a given price of memory: one minimum cut of the forward graph.

At a price of `us_per_mb` microseconds per MB kept, every forward tensor that the backward reads is either kept or
recomputed. Keeping it costs its bytes, or, where that is cheaper, a copy to the host and back. Recomputing it costs its
time, and all that it is made from must be kept or recomputed in turn. So the price of recomputing a tensor is that of
the cheapest chain from what is kept: chains, not single nodes, are chosen. This is a project selection problem (Picard,
Maximal closure of a graph, 1976), solved exactly by one minimum cut. Node v has two vertices in the network: `have v`
(its value is available in the backward) and `make v` (it is recomputed):

    source -> have v   infinite, if the backward reads v
    have v -> make v   bytes of v * price, or its price on the host: cut when v is kept, here or there
    make v -> sink     microseconds of v: cut when v is recomputed
    make v -> have u   infinite, for each forward u that v reads
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

_UNITS = 1 << 28  # the scaled sum of all finite capacities: the solver counts in 32-bit integers
_INFINITE = (1 << 31) - 1


@dataclass(frozen=True)
class Item:
    """One forward node. `reads`: the items it is computed from.

    - `bytes`: what keeping it takes; None if it cannot be kept by itself (a view, a tuple).
    - `microseconds`: to recompute it; None if it must not be recomputed (a kept layer boundary, a loop).
    - `away`: microseconds that keeping it on the host costs; None if it cannot be there.
    """

    reads: tuple[int, ...]
    bytes: int | None
    microseconds: float | None
    away: float | None = None

    def keeps_for(self, us_per_mb: float) -> float:
        """Microseconds that having it in the backward costs if it is not recomputed, where memory costs `us_per_mb`
        microseconds per MB.
        """
        here = np.inf if self.bytes is None else self.bytes / 1e6 * us_per_mb
        return here if self.away is None else min(here, self.away)

    def is_offloaded(self, us_per_mb: float) -> bool:
        """True if keeping it costs less on the host, where memory of the device costs `us_per_mb` microseconds per
        MB.
        """
        return self.away is not None and self.bytes is not None and self.away < self.bytes / 1e6 * us_per_mb


def cheapest_kept(items: Sequence[Item], wanted: Collection[int], us_per_mb: float) -> tuple[set[int], set[int]]:
    """The items to keep and those to recompute, at least total cost, so that all `wanted` are available in the
    backward.

    `us_per_mb`: microseconds per MB kept. ValueError if an item can neither be kept nor recomputed.

    >>> from ftrain.remat.mincut import Item, cheapest_kept
    >>> items = [Item((), 0, None), Item((0,), 40_000_000, 180.0), Item((1,), 40_000_000, 4000.0)]
    >>> cheapest_kept(items, {1, 2}, us_per_mb=10.0)  # 40 MB are worth 400 us
    ({0, 2}, {1})
    """
    have, make = (lambda v: 2 + 2 * v), (lambda v: 3 + 2 * v)
    edges: dict[tuple[int, int], float] = {(0, have(v)): np.inf for v in wanted}
    for v, item in enumerate(items):
        keep = item.keeps_for(us_per_mb)
        recompute = np.inf if item.microseconds is None else item.microseconds
        if np.isinf(keep) and np.isinf(recompute):
            raise ValueError(f"item {v} can neither be kept nor recomputed")
        edges[have(v), make(v)] = keep
        edges[make(v), 1] = recompute
        for u in item.reads:
            edges[make(v), have(u)] = np.inf
    reached = _source_side(edges, 2 + 2 * len(items))
    kept = {v for v in range(len(items)) if have(v) in reached and make(v) not in reached}
    return kept, {v for v in range(len(items)) if make(v) in reached}


def _source_side(edges: Mapping[tuple[int, int], float], size: int) -> set[int]:
    """The vertices that the source reaches once the maximum flow from 0 to 1 is subtracted."""
    if not edges:
        return {0}
    finite = [c for c in edges.values() if np.isfinite(c)]
    scale = _UNITS / max(sum(finite), 1e-9)
    rows, columns = np.array(list(edges)).T
    capacities = [_INFINITE if np.isinf(c) else round(c * scale) for c in edges.values()]
    network = csr_array((np.array(capacities, dtype=np.int32), (rows, columns)), shape=(size, size))
    flow = maximum_flow(network, 0, 1, method="dinic").flow
    left = network - flow
    left.data[left.data < 0] = 0
    left.eliminate_zeros()
    return set(breadth_first_order(left, 0, return_predecessors=False).tolist())
