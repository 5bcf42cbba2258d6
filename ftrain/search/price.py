"""The price of one layout: time, bytes sent and memory of a step, from a trace of a few layers.

Equal layers cost the same, so a step is lowered with few layers in each stack and once more with one layer more: the
difference is the price of a layer, and a sum over all layers the price of the whole. For memory that is done moment by
moment: what is alive in, say, the first layer's backward grows with the number of layers too, and the peak is the
highest of all moments so extended. What hiding communication adds is taken as it is with few layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ftrain.communication import bytes_moved
from ftrain.liveness import input_bytes
from ftrain.search.alive import Moment, moments_of
from ftrain.search.cluster import Cluster
from ftrain.search.device_ops import workspace_on
from ftrain.search.layouts import Candidate, Facts
from ftrain.search.lowering import lower
from ftrain.search.subject import Subject
from ftrain.search.two_streams import Tally, run_on_paper

FEW = 2  # layers: with fewer the first and the last would be one


@dataclass(frozen=True)
class Terms:
    """What was counted in one graph: times, bytes sent by purpose, bytes of the arguments, and the most bytes alive
    beyond them at each kind of moment, without (`plain`) and with (`moments`) communication hidden behind compute.
    """

    tally: Tally
    sent: Mapping[str, float]
    inputs: float
    plain: Mapping[Moment, float]
    moments: Mapping[Moment, float]


@dataclass(frozen=True)
class Price:
    """What a step of a layout takes on a cluster.

    `seconds` of a step; `compute`, `communication` and `exposed` (communication that compute waits for), seconds;
    `sent`: bytes that a rank sends, by purpose; `state`: bytes of a rank's arguments; `peak`: of all memory, with what
    the allocator adds; `tokens_per_second` of one GPU; `mfu` of the model's FLOPs with causal attention counted as half
    and `mfu_full` with all of it counted.
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


@dataclass(frozen=True)
class Layer:
    """What one layer more adds: two graphs that differ in it."""

    base: Terms
    more: Terms


def price(subject: Subject, candidate: Candidate, cluster: Cluster, minor: Mapping[str, Layer] | None = None) -> Price:
    """Price a layout. ValueError where the subject's step does not fit it.

    `minor`: a layer of each of the shorter stacks, if it is known (see `minor_layers`).
    """
    few, main = depths(subject), main_stack(subject)
    share = 1 / candidate.packs_at_once(subject.facts)
    base = count(subject, few, candidate, cluster, share)
    if minor is None:
        minor = _minor_layers(subject, base, candidate, cluster, share)
    whole = base
    for name, layers in subject.stacks.items():
        rest = layers - few[name]
        if rest and name == main:
            more = count(subject, {**few, name: few[name] + 1}, candidate, cluster, share)
            whole = extend(whole, Layer(base, more), rest)
        elif rest:
            whole = extend(whole, minor[name], rest)
    return priced(whole, candidate, subject.facts, cluster)


def minor_layers(subject: Subject, candidate: Candidate, cluster: Cluster) -> dict[str, Layer]:
    """A layer of each stack but the longest, on one layout.

    Layouts with as many ranks and the same recompute share it: media are divided over all ranks alike.
    """
    if len(subject.stacks) < 2:
        return {}
    share = 1 / candidate.packs_at_once(subject.facts)
    base = count(subject, depths(subject), candidate, cluster, share)
    return _minor_layers(subject, base, candidate, cluster, share)


def _minor_layers(
    subject: Subject, base: Terms, candidate: Candidate, cluster: Cluster, share: float
) -> dict[str, Layer]:
    few, main = depths(subject), main_stack(subject)
    return {
        name: Layer(base, count(subject, {**few, name: few[name] + 1}, candidate, cluster, share))
        for name, layers in subject.stacks.items()
        if name != main and layers > few[name]
    }


def main_stack(subject: Subject) -> str | None:
    """The stack of most layers."""
    return max(subject.stacks, key=lambda name: subject.stacks[name], default=None)


def depths(subject: Subject) -> dict[str, int]:
    """How many layers of each stack are traced: of the longest few, of others one."""
    main = main_stack(subject)
    return {name: min(FEW if name == main else 1, layers) for name, layers in subject.stacks.items()}


def count(
    subject: Subject, depths: Mapping[str, int], candidate: Candidate, cluster: Cluster, attention_share: float
) -> Terms:
    """Lower the step with so many layers and count."""
    lowered = lower(subject.make(depths, candidate), candidate, cluster, attention_share=attention_share)
    tally = run_on_paper(lowered.ordered, lowered.mesh, times=lowered.times, cluster=cluster)
    sent: dict[str, float] = dict(bytes_moved(lowered.ordered, lowered.mesh))
    workspace = workspace_on(cluster.device_type)
    moments = moments_of(lowered.final, workspace=workspace)
    plain = moments if lowered.final is lowered.plain else moments_of(lowered.plain, workspace=workspace)
    return Terms(tally, sent, input_bytes(lowered.plain), plain, moments)


def extend(whole: Terms, layer: Layer, layers: int) -> Terms:
    """`whole` with so many layers more."""
    base, more = layer.base, layer.more

    def line(a: float, few: float, one_more: float) -> float:
        return a + layers * (one_more - few)

    def time(of: Callable[[Tally], float]) -> float:
        return line(of(whole.tally), of(base.tally), of(more.tally))

    # a layer more never hides what was exposed without it: where less waits, the schedule only found another order
    exposed = whole.tally.exposed + layers * max(0.0, more.tally.exposed - base.tally.exposed)
    step = time(lambda t: t.step - t.exposed) + exposed
    tally = Tally(step, time(lambda t: t.compute), time(lambda t: t.communication), exposed)
    purposes = {*whole.sent, *more.sent}
    sent = {p: line(whole.sent.get(p, 0), base.sent.get(p, 0), more.sent.get(p, 0)) for p in sorted(purposes)}
    plain = {k: line(w, base.plain.get(k, 0.0), more.plain.get(k, 0.0)) for k, w in whole.plain.items()
             if (k in base.plain) == (k in more.plain)}  # fmt: skip
    ahead = {
        k: max((t.moments[k] - t.plain[k] for t in (whole, more) if k in t.moments and k in t.plain), default=0.0)
        for k in plain
    }
    moments = {k: plain[k] + ahead[k] for k in plain}
    return Terms(tally, sent, line(whole.inputs, base.inputs, more.inputs), plain, moments)


def priced(whole: Terms, candidate: Candidate, facts: Facts, cluster: Cluster) -> Price:
    """What the terms of a whole model mean in tokens per second and shares of the peak."""
    seconds = max(whole.tally.step, whole.tally.compute) / 1e6
    rate = facts.tokens * facts.packs / candidate.ranks / seconds
    seen = facts.attention_flops / 2 if facts.causal else facts.attention_flops
    most = max((*whole.plain.values(), *whole.moments.values()), default=0.0)
    return Price(
        candidate=candidate,
        seconds=seconds,
        compute=whole.tally.compute / 1e6,
        communication=whole.tally.communication / 1e6,
        exposed=max(0.0, whole.tally.exposed) / 1e6,
        sent=whole.sent,
        state=whole.inputs,
        peak=cluster.efficiency.fragmentation * (whole.inputs + most),
        tokens_per_second=rate,
        mfu=rate * (facts.weight_flops + seen) / cluster.bf16,
        mfu_full=rate * (facts.weight_flops + facts.attention_flops) / cluster.bf16,
    )
