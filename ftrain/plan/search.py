"""The search: every legal layout is estimated, the most promising are traced and priced, all are ranked or rejected."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context

import torch

from ftrain.analysis.cluster import Cluster
from ftrain.graph.text import show_bytes
from ftrain.plan.cost import MEMORY, Layer, Price, minor_layers, price
from ftrain.plan.estimate import Estimate, Weights, estimate, kinds_of, weights_on
from ftrain.plan.outcomes import Outcomes, with_ways_out
from ftrain.plan.space import Candidate, Rejected, Space, layouts
from ftrain.plan.workload import Workload

LoadWorkload = Callable[[], Workload]
Guessed = tuple[Candidate, Estimate]
Minor = dict[str | float, dict[str, Layer] | None]  # by the way to recompute
_WAVE = 1  # layouts that each process traces before the rest is ranked anew


@dataclass(frozen=True)
class Options:
    """How much to search.

    - `traced`: how many layouts are traced. `processes`: how many processes trace at the same time.
    - `space`: the choices that are tried.
    - `memory`: the share of a GPU's memory that a step may use.
    - `seconds`: after these no further layouts are traced.
    """

    traced: int = 40
    processes: int = 2
    space: Space = field(default_factory=Space)
    memory: float = MEMORY
    seconds: float = float("inf")


@dataclass(frozen=True)
class Result:
    """What a search found; each layout is in one of the three lists.

    - `prices`: of traced layouts that fit, fastest first.
    - `untraced`: legal layouts that were only estimated, fastest first.
    - `rejected`: layouts that cannot run, with reasons.
    - `bounds`: a lower bound of the seconds of each traced layout.
    """

    prices: list[Price]
    untraced: list[Guessed]
    rejected: list[Rejected]
    bounds: Mapping[Candidate, float] = field(default_factory=dict)


def search(
    workload: Workload,
    ranks: int,
    cluster: Cluster,
    options: Options = Options(),
    *,
    load: LoadWorkload | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Search the layouts of a workload's step on `ranks` GPUs of a cluster.

    `load`: makes the workload in another process (a picklable function); without it this process traces all. `say`:
    called with lines about the progress. ValueError if no layout is legal.
    """
    found, rejected = layouts(ranks, workload.model_shape, options.space)
    if not found:
        reasons = "; ".join(dict.fromkeys(r.reason for r in rejected))
        raise ValueError(f"{workload.name} has no legal layout on {ranks} ranks: {reasons}")
    limit = options.memory * cluster.memory
    estimates = _estimates(workload, found, cluster)
    outcomes = Outcomes(limit, rejected)
    fitting = []
    for c, e in sorted(estimates, key=lambda item: item[1].seconds):
        if e.memory * cluster.efficiency.fragmentation > limit:
            outcomes.refuse_before_trace(c, e.memory * cluster.efficiency.fragmentation)
        else:
            fitting.append((c, e))
    say(f"{len(found)} legal layouts, {len(fitting)} may fit; at most {options.traced} of them are traced")
    rest = _first_of_each_kind(fitting, options.traced)
    minor: Minor = {}
    traced, deadline = 0, time.monotonic() + options.seconds
    with _workers(options, load) as pool:
        while rest and traced < options.traced and (not traced or time.monotonic() < deadline):
            wave = rest[: min(_WAVE * options.processes, options.traced - traced)]
            rest = rest[len(wave) :]
            traced += len(wave)
            chosen = [c for c, _ in wave]
            _learn_minor(minor, workload, chosen, cluster, pool, load)
            answers = _traced(workload, chosen, cluster, minor, pool, load, options.memory)
            for (candidate, guess), outcome in zip(wave, answers, strict=True):
                outcomes.enter(candidate, guess, outcome, workload.model_shape)
                say(f"{candidate}: {outcome if isinstance(outcome, str) else _figures(outcome)}")
            rest = [item for item in rest if not outcomes.hopeless(*item, workload.model_shape)]
            rest.sort(key=lambda item: outcomes.expected(*item) > limit)  # stable: the fastest of each group stay first
    rest.sort(key=lambda item: item[1].seconds)
    bounds = {c: e.seconds for c, e in fitting}
    prices = sorted(outcomes.prices, key=lambda p: p.seconds)
    refused = with_ways_out(outcomes.rejected, prices, options.memory)
    return Result(prices, rest, refused, {p.candidate: bounds[p.candidate] for p in prices})


def _estimates(workload: Workload, candidates: Sequence[Candidate], cluster: Cluster) -> list[Guessed]:
    work = workload.make(dict.fromkeys(workload.stacks, 1), candidates[0])
    kinds, model = kinds_of(workload, candidates[0]), workload.model_shape
    weights: dict[tuple[int, int, int, int], Weights] = {}
    found = []
    for c in candidates:
        key = (c.replicate, c.shard, c.sequence, c.expert)
        if key not in weights:
            weights[key] = weights_on(kinds, work.plan(c))
        found.append((c, estimate(c, weights[key], model, cluster)))
    return found


def _first_of_each_kind(ranked: Sequence[Guessed], number: int) -> list[Guessed]:
    """Fastest first, except that half of the first `number` are the first of a kind, which estimates alone may
    misjudge.
    """
    kinds: dict[tuple[int, str | float, bool], Guessed] = {}
    for item in ranked:
        kinds.setdefault((item[0].sequence, item[0].remat, item[0].expert > 1), item)
    first = list(kinds.values())[: number // 2]
    return list({item[0]: item for item in [*first, *ranked]}.values())


@contextmanager
def _workers(options: Options, load: LoadWorkload | None) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that trace, or None where this one does it alone."""
    if load is None or options.processes < 2:
        yield None
        return
    with ProcessPoolExecutor(options.processes, get_context("spawn"), _start_worker) as pool:
        yield pool


def _learn_minor(
    minor: Minor,
    workload: Workload,
    chosen: Sequence[Candidate],
    cluster: Cluster,
    pool: ProcessPoolExecutor | None,
    load: LoadWorkload | None,
) -> None:
    """Price a layer of the shorter stacks for each way to recompute that has no price yet."""
    new = {c.remat: c for c in chosen if c.remat not in minor and len(workload.stacks) > 1}
    if pool is None or load is None:
        minor.update({remat: _minor_of(workload, c, cluster) for remat, c in new.items()})
        return
    tasks = {remat: pool.submit(_minor_loaded, load, c, cluster) for remat, c in new.items()}
    minor.update({remat: task.result() for remat, task in tasks.items()})


def _traced(
    workload: Workload,
    chosen: Sequence[Candidate],
    cluster: Cluster,
    minor: Minor,
    pool: ProcessPoolExecutor | None,
    load: LoadWorkload | None,
    memory: float,
) -> list[Price | str]:
    if pool is None or load is None:
        return [_attempt(workload, c, cluster, minor.get(c.remat), memory) for c in chosen]
    tasks = [pool.submit(_attempt_loaded, load, c, cluster, minor.get(c.remat), memory) for c in chosen]
    return [task.result() for task in tasks]


def _figures(p: Price) -> str:
    return f"{p.tokens_per_second:.0f} tokens/s/GPU, {show_bytes(int(p.peak))}"


def _start_worker() -> None:
    torch.set_num_threads(1)


def _attempt_loaded(
    load: LoadWorkload, candidate: Candidate, cluster: Cluster, minor: Mapping[str, Layer] | None, memory: float
) -> Price | str:
    return _attempt(load(), candidate, cluster, minor, memory)


def _attempt(
    workload: Workload, candidate: Candidate, cluster: Cluster, minor: Mapping[str, Layer] | None, memory: float
) -> Price | str:
    """The price, or why the step cannot be lowered: the first line of the error."""
    try:
        return price(workload, candidate, cluster, minor, memory=memory)
    except (ValueError, RuntimeError) as error:
        return f"cannot be lowered: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _minor_loaded(load: LoadWorkload, candidate: Candidate, cluster: Cluster) -> dict[str, Layer] | None:
    return _minor_of(load(), candidate, cluster)


def _minor_of(workload: Workload, candidate: Candidate, cluster: Cluster) -> dict[str, Layer] | None:
    """None where the step cannot be lowered on this layout: each layout is then priced by itself."""
    try:
        return minor_layers(workload, candidate, cluster)
    except (ValueError, RuntimeError):
        return None
