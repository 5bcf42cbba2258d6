"""The price of one layout: time, bytes sent and memory of a step, from traces of a few layers.

Equal layers cost the same. So a step is lowered with few layers in each stack, and once more with one more layer: the
difference is the price of a layer, and a sum over all layers gives the price of the whole model. For memory this is
done by region: what is alive in, say, the first layer's backward grows with the number of layers too, and the peak is
the highest of all regions after extrapolation. The memory that hiding communication adds is taken as it is with few
layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ftrain.analysis.cluster import Cluster
from ftrain.analysis.communication import bytes_moved
from ftrain.analysis.device_ops import workspace_on
from ftrain.analysis.liveness import input_bytes
from ftrain.analysis.simulate import Tally
from ftrain.plan.cluster_links import filled_sends, simulate_on_cluster
from ftrain.plan.contributors import Contributor, contributors
from ftrain.plan.liveness_by_region import Region, peak_by_region
from ftrain.plan.lowering import Draft, draft
from ftrain.plan.space import Candidate, ModelShape
from ftrain.plan.workload import Workload

K = TypeVar("K")
MEMORY = 0.95  # share of a GPU's memory that a step may use
FEW = 2  # traced layers of the longest stack: with one, the first would be the last


@dataclass(frozen=True)
class Terms:
    """The terms of a price: what one rank's graph of a step takes, counted in it or extended to more layers.

    - `tally`: simulated microseconds of the step, its compute and its communication (see `Tally`).
    - `sent`: bytes that a rank sends in a step, by purpose, as "fsdp_gather" (see `bytes_moved`).
    - `inputs`: bytes of the graph's arguments: state and batch.
    - `plain`, `peaks`: the most bytes alive beyond the arguments, by region (a phase, and a place in a stack of
      layers), before and after communication is hidden behind compute, which takes memory.
    - `ops`: microseconds of compute, by kind of op.

    Two `Terms` of graphs that differ in one layer are a `Layer`; `extend` adds such layers, and `priced` makes a
    `Price` of the sum.
    """

    tally: Tally
    sent: Mapping[str, float]
    inputs: float
    plain: Mapping[Region, float]
    peaks: Mapping[Region, float]
    ops: Mapping[Contributor, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Price:
    """What a step of a layout takes on a cluster.

    - `seconds`: of a step; `compute`, `communication`, `exposed` (communication that compute waits for): seconds of it.
    - `sent`: bytes that a rank sends, by purpose.
    - `state`: bytes of a rank's arguments; `peak`: bytes of all memory, with what the allocator adds.
    - `tokens_per_second`: of one GPU.
    - `mfu`: model FLOPs utilization with causal attention counted as half; `mfu_full`: with all of it counted.
    - `ops`: microseconds of compute by kind of op.
    """

    candidate: Candidate
    seconds: float
    compute: float
    communication: float
    exposed: float
    sent: Mapping[str, float]
    state: float
    peak: float
    tokens_per_second: float
    mfu: float
    mfu_full: float
    ops: Mapping[Contributor, float] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Layer:
    """What one more layer adds: two graphs that differ in it."""

    base: Terms
    more: Terms


def price(
    workload: Workload,
    candidate: Candidate,
    cluster: Cluster,
    minor: Mapping[str, Layer] | None = None,
    *,
    memory: float = MEMORY,
) -> Price:
    """The price of the layout `candidate` of a workload on a cluster. ValueError where the workload's step does not fit
    it.

    `minor`: a layer of each of the shorter stacks, if it is known (see `minor_layers`). `memory`: the share of a GPU's
    memory that a step may use; what the whole step leaves of it is what prefetched messages may take.
    """
    few, main = depths(workload), main_stack(workload)
    deeper = [name for name, layers in workload.stacks.items() if layers > few[name]]
    traced = [name for name in deeper if name == main or minor is None]
    drafts = {name: _draft(workload, _one_more(few, name), candidate, cluster) for name in ("", *traced)}
    whole = plain_terms(drafts[""])
    for name in deeper:
        layer = Layer(plain_terms(drafts[""]), plain_terms(drafts[name])) if name in drafts else (minor or {})[name]
        whole = extend(whole, layer, workload.stacks[name] - few[name])
    spare = memory * cluster.memory / cluster.efficiency.fragmentation - whole.inputs - _most(whole)
    found = {name: count(d, spare=max(0.0, spare)) for name, d in drafts.items()}
    whole = found[""]
    for name in deeper:
        layer = Layer(found[""], found[name]) if name in found else (minor or {})[name]
        whole = extend(whole, layer, workload.stacks[name] - few[name])
    return priced(whole, candidate, workload.model_shape, cluster)


def minor_layers(workload: Workload, candidate: Candidate, cluster: Cluster) -> dict[str, Layer]:
    """A layer of each stack except the longest, by stack, priced on the layout `candidate` of a cluster.

    Layouts with as many ranks and the same recompute share it: media are divided over all ranks alike. ValueError where
    the workload's step does not fit the layout.
    """
    few, main = depths(workload), main_stack(workload)
    names = [name for name, layers in workload.stacks.items() if name != main and layers > few[name]]
    if not names:
        return {}
    base = count(_draft(workload, few, candidate, cluster), spare=None)
    more = {name: count(_draft(workload, _one_more(few, name), candidate, cluster), spare=None) for name in names}
    return {name: Layer(base, terms) for name, terms in more.items()}


def main_stack(workload: Workload) -> str | None:
    """The stack with most layers; None without stacks."""
    return max(workload.stacks, key=lambda name: workload.stacks[name], default=None)


def depths(workload: Workload) -> dict[str, int]:
    """How many layers of each stack are traced: `FEW` of the longest, one of others."""
    main = main_stack(workload)
    return {name: min(FEW if name == main else 1, layers) for name, layers in workload.stacks.items()}


def _one_more(few: Mapping[str, int], name: str) -> dict[str, int]:
    return {stack: layers + (stack == name) for stack, layers in few.items()}


def _draft(workload: Workload, depths: Mapping[str, int], candidate: Candidate, cluster: Cluster) -> Draft:
    share = 1 / candidate.packs_at_once(workload.model_shape)
    return draft(workload.make(depths, candidate), candidate, cluster, attention_share=share)


def plain_terms(draft: Draft) -> Terms:
    """Memory alone, without communication hidden."""
    plain = peak_by_region(draft.plain, workspace=workspace_on(draft.cluster.device_type))
    return Terms(Tally(0.0, 0.0, 0.0, 0.0), {}, input_bytes(draft.plain), plain, plain)


def count(draft: Draft, *, spare: float | None) -> Terms:
    """Hide the communication of a step, with `spare` bytes of memory for it (see `Draft.hide`), and count."""
    lowered, cluster = draft.hide(spare=spare), draft.cluster
    tally = simulate_on_cluster(lowered.ordered, lowered.mesh, times=lowered.times, cluster=cluster)
    sent: dict[str, float] = dict(bytes_moved(lowered.ordered, lowered.mesh, count=filled_sends))
    workspace = workspace_on(cluster.device_type)
    peaks = peak_by_region(lowered.final, workspace=workspace)
    plain = peaks if lowered.final is lowered.plain else peak_by_region(lowered.plain, workspace=workspace)
    ops = contributors(lowered.ordered, lowered.times)
    return Terms(tally, sent, input_bytes(lowered.plain), plain, peaks, ops)


def extend(whole: Terms, layer: Layer, layers: int) -> Terms:
    """`whole` with so many more layers."""
    base, more = layer.base, layer.more

    def line(a: float, few: float, one_more: float) -> float:
        return a + layers * (one_more - few)

    def time(of: Callable[[Tally], float]) -> float:
        return line(of(whole.tally), of(base.tally), of(more.tally))

    def each(whole: Mapping[K, float], base: Mapping[K, float], more: Mapping[K, float]) -> dict[K, float]:
        keys = dict.fromkeys([*whole, *more])
        return {k: line(whole.get(k, 0.0), base.get(k, 0.0), more.get(k, 0.0)) for k in keys}

    # One more layer never hides what was exposed without it: where less waits, the schedule only found another order.
    exposed = whole.tally.exposed + layers * max(0.0, more.tally.exposed - base.tally.exposed)
    step = time(lambda t: t.step - t.exposed) + exposed
    links = each(whole.tally.links, base.tally.links, more.tally.links)
    tally = Tally(step, time(lambda t: t.compute), time(lambda t: t.communication), exposed, links)

    sent, ops = each(whole.sent, base.sent, more.sent), each(whole.ops, base.ops, more.ops)
    plain = {k: line(w, base.plain.get(k, 0.0), more.plain.get(k, 0.0)) for k, w in whole.plain.items()
             if (k in base.plain) == (k in more.plain)}  # fmt: skip
    ahead = {
        k: max((t.peaks[k] - t.plain[k] for t in (whole, more) if k in t.peaks and k in t.plain), default=0.0)
        for k in plain
    }
    peaks = {k: plain[k] + ahead[k] for k in plain}
    return Terms(tally, sent, line(whole.inputs, base.inputs, more.inputs), plain, peaks, ops)


def priced(whole: Terms, candidate: Candidate, model: ModelShape, cluster: Cluster) -> Price:
    """The price of the layout `candidate` on a cluster, from the terms of the `whole` model: tokens per second, shares
    of the GPU's peak FLOPs, bytes.
    """
    # Where links are always busy, schedules of a few layers underestimate what one more layer waits.
    seconds = max(whole.tally.step, whole.tally.compute, *whole.tally.links.values()) / 1e6
    rate = model.tokens * model.packs / candidate.ranks / seconds
    seen = model.attention_flops / 2 if model.causal else model.attention_flops
    return Price(
        candidate=candidate,
        seconds=seconds,
        compute=whole.tally.compute / 1e6,
        communication=whole.tally.communication / 1e6,
        exposed=seconds - whole.tally.compute / 1e6,
        sent=whole.sent,
        state=whole.inputs,
        peak=cluster.efficiency.fragmentation * (whole.inputs + _most(whole)),
        tokens_per_second=rate,
        mfu=rate * (model.weight_flops + seen) / cluster.bf16,
        mfu_full=rate * (model.weight_flops + model.attention_flops) / cluster.bf16,
        ops=whole.ops,
    )


def _most(terms: Terms) -> float:
    """Bytes beyond the arguments at the peak."""
    return max((*terms.plain.values(), *terms.peaks.values()), default=0.0)
