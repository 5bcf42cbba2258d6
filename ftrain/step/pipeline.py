"""The passes between a trace and the program that runs, as lists, and the one function that runs them.

- `PREPARED` turns a trace into a rank's graph, with its recompute.
- `HIDDEN` orders it so that communication hides behind compute.
- `DONATED` writes the new state over the old one.
- `EXECUTED` brings it to the form that runs.

A jitted step runs all of them, the layout search runs the same ones with the times of a cluster, and the check of a
budget runs the last two on a copy.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx

from ftrain.analysis.liveness import plan_memory
from ftrain.analysis.op_times import OpTimes
from ftrain.graph.collectives import groups_of
from ftrain.graph.layers import mark_layers
from ftrain.graph.layouts import views_as_reshapes
from ftrain.graph.loop import with_bodies
from ftrain.graph.sizes import expect_sizes
from ftrain.graph.text import op_name
from ftrain.passes.bucket import bucket
from ftrain.passes.clean import clean
from ftrain.passes.donate import carry_in_place, donate, write_in_place
from ftrain.passes.early_reductions import sum_early
from ftrain.passes.early_updates import update_early
from ftrain.passes.fuse import fuse_runs
from ftrain.passes.join_waits import join_waits
from ftrain.passes.overlap import overlap
from ftrain.passes.paths import assign_paths
from ftrain.passes.reinplace import reinplace
from ftrain.passes.reuse import reuse_memory
from ftrain.passes.sink_gathers import gather_chains, sink_gathers
from ftrain.remat.fit import fit
from ftrain.remat.policy import Remat, rematerialize, require_matches
from ftrain.sharding.link import Link
from ftrain.sharding.mesh import Mesh
from ftrain.trace.tracer import Aval

DISABLE = "FTRAIN_DISABLE_PASSES"
"""The environment variable with the names of passes to leave out, separated by commas."""


@dataclass(frozen=True)
class Setting:
    """What the passes of one step are told.

    - `leaves`: abstract values of the arguments by path; `state`: the name of the argument whose paths name parameters.
    - `donated`: from the name of a placeholder to the output that is written over it.
    - `device`; `backend`: as `ftrain.runtime.execute.choose` resolves it; `remat`: as in `ftrain.jit`.
    - `times`: returns how long ops take; called only where a pass needs it.
    - `mesh`, `link`: None and the default without a mesh. `hides`: whether communication is hidden behind compute.
    - `within(graph)`: bytes beyond the arguments that hiding communication may use; None: the default of `overlap`.
    - `score`: see `ftrain.passes.overlap.overlap`.
    - `disabled`: names of passes to leave out, by default those in `FTRAIN_DISABLE_PASSES`. ValueError where one of
      these is no pass, or one that later passes need.
    """

    leaves: Mapping[str, Aval]
    state: str
    donated: Mapping[str, int]
    device: torch.device
    backend: str
    remat: Remat
    times: Callable[[], OpTimes]
    mesh: Mesh | None = None
    link: Link = Link()  # noqa: RUF009  # frozen
    hides: bool = True
    within: Callable[[fx.GraphModule], int | None] = lambda _: None
    score: Callable[[fx.GraphModule], float] | None = None
    disabled: frozenset[str] = field(default_factory=lambda: _disabled())

    @property
    def granularity(self) -> int:
        """Bytes to which the allocator rounds sizes: 512 on CUDA, 1 on a CPU."""
        return 512 if self.device.type == "cuda" else 1


@dataclass(frozen=True)
class Pass:
    """A change of a graph that keeps all values to the bit.

    - `run(module, setting)` changes the graph in place, or returns another one.
    - `when(setting)`: whether the pass runs.
    - `bodies`: run it on the bodies of loops too, each by itself, innermost first. Other passes look into loops
      themselves.
    - `needed`: later passes rely on it, so it cannot be disabled.
    """

    name: str
    run: Callable[[fx.GraphModule, Setting], fx.GraphModule | None]
    when: Callable[[Setting], bool] = lambda _: True
    bodies: bool = False
    needed: bool = False


@dataclass(frozen=True)
class PassRun:
    """What a pass did: its `seconds`, how many ops of each kind it `added` and `removed`, and whether it `reordered`
    nodes.
    """

    name: str
    seconds: float
    added: Mapping[str, int]
    removed: Mapping[str, int]
    reordered: bool

    def __str__(self) -> str:
        changes = [f"+{n} {op}" for op, n in self.added.items()]
        changes += [f"-{n} {op}" for op, n in self.removed.items()]
        changes += ["reordered"] if self.reordered else []
        return f"{self.name:22} {self.seconds * 1e3:9.1f} ms  {', '.join(changes) or 'no change'}"


Observe = Callable[[str, fx.GraphModule], None]
"""Called with the name of each pass and the graph after it; first with "trace" and the graph before all passes."""


def run_passes(
    module: fx.GraphModule,
    passes: Sequence[Pass],
    setting: Setting,
    *,
    runs: list[PassRun] | None = None,
    observe: Observe | None = None,
) -> fx.GraphModule:
    """Run those of `passes` that the setting asks for, in order, and return the graph after them. `module` is changed.

    `runs`: a list to which an entry for each pass is appended. `observe`: called after each pass. ValueError where a
    pass refuses the step: a budget that cannot be met, a glob of `Remat.paths` that matches nothing.
    """
    before = _GraphOps(module) if runs is not None else None
    for each in passes:
        if each.name in setting.disabled or not each.when(setting):
            continue
        started = time.perf_counter()
        module = _run(module, each, setting)
        seconds = time.perf_counter() - started
        if runs is not None and before is not None:
            after = _GraphOps(module)
            runs.append(before.compared(each.name, seconds, after))
            before = after
        if observe is not None:
            observe(each.name, module)
    return module


def _run(module: fx.GraphModule, each: Pass, setting: Setting) -> fx.GraphModule:
    if each.bodies:
        for graph in with_bodies(module):
            each.run(graph, setting)
        return module
    return each.run(module, setting) or module


class _GraphOps:
    """The nodes of a graph and of the bodies of its loops, in order, to compare a graph before and after a pass."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._nodes = [(n.name, op_name(n)) for g in with_bodies(module) for n in g.graph.nodes]

    def compared(self, name: str, seconds: float, after: "_GraphOps") -> PassRun:
        ops, later = (Counter(op for _, op in look._nodes) for look in (self, after))
        both = {n for n, _ in self._nodes} & {n for n, _ in after._nodes}
        order, new_order = ([n for n, _ in look._nodes if n in both] for look in (self, after))
        return PassRun(name, seconds, later - ops, ops - later, order != new_order)


def pass_table(runs: Sequence[PassRun]) -> str:
    """The text of `Compiled.pass_table`: a line per pass."""
    return "\n".join(map(str, runs))


def _disabled() -> frozenset[str]:
    names = frozenset(filter(None, (name.strip() for name in os.environ.get(DISABLE, "").split(","))))
    known = {each.name: each for each in (*PREPARED, *HIDDEN, *DONATED, *INTERPRETED)}
    for name in sorted(names):
        if name not in known:
            raise ValueError(f"{DISABLE} names {name!r}, which is no pass; passes are {', '.join(known)}")
        if known[name].needed:
            raise ValueError(f"{DISABLE} names {name!r}, which later passes rely on: it cannot be left out")
    return names


def _each(function: Callable[[fx.GraphModule], None]) -> Callable[[fx.GraphModule, Setting], None]:
    return lambda module, _: function(module)


def _on_mesh(setting: Setting) -> bool:
    return setting.mesh is not None


def _compiles(setting: Setting) -> bool:
    return setting.backend != "aten"


def _recompute_by_price(module: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    return fit(
        module,
        dict(setting.donated),
        setting.remat,
        times=setting.times(),
        device=setting.device,
        mesh=setting.mesh,
        finished_peak=partial(finished_peak, setting=setting),
    )


def finished_peak(module: fx.GraphModule, setting: Setting) -> int:
    """Bytes beyond the arguments at the peak of a prepared graph `module` in the form that runs, by the passes of
    `setting`. The graph is changed.
    """
    return plan_memory(run_passes(module, (*DONATED, *EXECUTED), setting), round_to=setting.granularity).peak


def _overlap(module: fx.GraphModule, setting: Setting) -> None:
    assert setting.mesh is not None
    if groups_of(module):
        overlap(
            module,
            setting.mesh,
            times=setting.times(),
            link=setting.link,
            within=setting.within(module),
            score=setting.score,
            donated=setting.donated,
        )


PREPARED = (
    Pass("join_waits", _each(join_waits), bodies=True, needed=True),
    Pass("clean", _each(clean), bodies=True),
    Pass("expect_sizes", _each(expect_sizes), bodies=True, needed=True),
    Pass("sink_gathers", _each(sink_gathers), when=_on_mesh, bodies=True),
    Pass("sum_early", _each(sum_early), when=_on_mesh, bodies=True),
    Pass("assign_paths", lambda m, s: assign_paths(m, s.state), needed=True),
    Pass("mark_layers", lambda m, s: mark_layers(m, s.leaves), needed=True),
    Pass("require_matches", lambda m, s: require_matches(m, s.remat), needed=True),
    Pass("recompute_by_policy", lambda m, s: rematerialize(m, s.remat, gathers=gather_chains(m)), bodies=True),
    Pass("bucket", lambda m, s: bucket(m, limit=s.link.bucket_bytes), when=_on_mesh, bodies=True),
    Pass("update_early", lambda m, s: update_early(m, dict(s.donated))),
    Pass("recompute_by_price", _recompute_by_price, when=lambda s: s.remat.by_price or s.remat.offloads_paths),
)
HIDDEN = (Pass("overlap", _overlap, when=lambda s: s.mesh is not None and s.hides),)
DONATED = (Pass("donate", lambda m, s: donate(m, dict(s.donated)), needed=True),)
FUSED = (Pass("fuse_runs", _each(fuse_runs), when=_compiles, bodies=True),)
EXECUTED = (
    Pass("reinplace", _each(reinplace), bodies=True),
    *FUSED,
    Pass("write_in_place", _each(write_in_place), bodies=True),
    Pass("carry_in_place", _each(carry_in_place), bodies=True),
    Pass("reuse_memory", _each(reuse_memory), bodies=True),
)
INTERPRETED = (*EXECUTED, Pass("views_as_reshapes", _each(views_as_reshapes), bodies=True, needed=True))
"""`EXECUTED` for graphs that run without the check of real layouts (`LayoutCheck`)."""
