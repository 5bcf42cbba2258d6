"""A step made ready for given shapes: the graph after its passes, and what can be said of it before it runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import fx

from ftrain.analysis.communication import bytes_moved
from ftrain.analysis.cuda_allocator import CUBLAS_WORKSPACE, reserved_over_allocated
from ftrain.analysis.flops import Cost, graph_cost
from ftrain.analysis.liveness import MemoryPlan, plan_memory
from ftrain.analysis.op_times import OpTimes
from ftrain.graph.loop import copy_graph
from ftrain.passes.overlap import Schedule, simulate_schedule
from ftrain.remat.fit import decision_table, decisions
from ftrain.report.graph_text import graph_text
from ftrain.report.step_data import StepData
from ftrain.report.step_page import write_report
from ftrain.sharding.link import Link
from ftrain.sharding.placement import Placement
from ftrain.step.donated import Donation
from ftrain.step.pipeline import EXECUTED, INTERPRETED, Pass, PassRun, Setting, pass_table, run_passes
from ftrain.step.signature import Signature
from ftrain.trace.tracer import Traced


@dataclass(frozen=True, eq=False)
class Compiled:
    """What a trace and the passes yield; a `Runner` runs it.

    `graph`: after all passes but those that bring it to the form that runs (see `executed`). `setting`: what the passes
    were told. `signature`: the arguments it is for. `donation`: the leaves that the new state is written over.
    `placements`: on a mesh, where the pieces of each result are. `passes`: what each did. `recompile(remat=...,
    observe=...)`: the same step made ready again.
    """

    name: str
    traced: Traced
    graph: fx.GraphModule
    setting: Setting
    signature: Signature
    donation: Donation
    placements: Sequence[Placement]
    passes: Sequence[PassRun]
    seconds_to_compile: float
    recompile: Callable[..., "Compiled"] = field(repr=False)
    _forms: dict[str, fx.GraphModule] = field(default_factory=dict, repr=False)

    @property
    def donated_leaves(self) -> list[int]:
        """Which leaves of the arguments the step writes its new state over."""
        return [self.signature.slots[slot] for slot in self.donation.slots]

    def memory(self) -> MemoryPlan:
        """Bytes alive over the run, the peak, and what is alive then; on CUDA also what is reserved for it."""
        plan = plan_memory(self.executed, round_to=self.setting.granularity)
        if self.setting.device.type != "cuda":
            return plan
        return replace(plan, libraries=CUBLAS_WORKSPACE, reserved_share=reserved_over_allocated())

    def cost(self) -> Cost:
        """FLOPs and bytes per node, and in all."""
        return graph_cost(self.graph)

    @property
    def executed(self) -> fx.GraphModule:
        """The graph as it runs: writes in place; under a compiler, what it may fuse as one node each."""
        return self._form("executed", EXECUTED, self.setting)

    @property
    def interpreted(self) -> fx.GraphModule:
        """The graph as it runs op by op, whatever the backend."""
        return self._form("interpreted", INTERPRETED, replace(self.setting, backend="aten"))

    def _form(self, name: str, passes: Sequence[Pass], setting: Setting) -> fx.GraphModule:
        if name not in self._forms:
            self._forms[name] = run_passes(copy_graph(self.graph), passes, setting)
        return self._forms[name]

    def forget_forms(self) -> None:
        """The graph has been mended: make `executed` and `interpreted` anew when they are asked for."""
        self._forms.clear()

    def as_text(self) -> str:
        """The graph, a line per node: name, type, op, and where it comes from."""
        return graph_text(self.executed)

    def report(self, file: str | Path, *, title: str = "") -> Path:
        """Write an HTML page about the step: totals, memory over time, costs, the graph.

        `title` is what stands over it, such as the model and the run; without one it is the step's name.
        """
        return write_report(self.data(), Path(file), title=title)

    def data(self) -> StepData:
        """What reports and explanations read of the step."""
        mesh = self.setting.mesh
        return StepData(
            name=self.name,
            traced=self.traced,
            graph=self.graph,
            executed=self.executed,
            memory=self.memory(),
            written=len(self.donation.outputs),
            backend=self.setting.backend,
            device=self.setting.device,
            alone=mesh is None or mesh.kind != "process" or mesh.size == 1,
            seconds_to_compile=self.seconds_to_compile,
            recompile=lambda remat: self.recompile(remat=remat).data(),
        )

    def schedule(self, link: Link | None = None) -> Schedule:
        """When each collective starts and ends, what it overlaps, and how long compute waits for it, on paper."""
        mesh, times = self.setting.mesh, OpTimes.on(self.setting.device)
        if mesh is None:
            return Schedule([], 0.0, 0.0, 0.0)
        return simulate_schedule(self.graph, mesh, times=times, link=link or self.setting.link)

    def bytes_moved(self) -> Mapping[str, int]:
        """Bytes that a rank sends in one step, by purpose."""
        return {} if self.setting.mesh is None else bytes_moved(self.graph, self.setting.mesh)

    def remat_table(self) -> str:
        """What was decided on recompute: each tensor that the backward needs, its MB, microseconds, their ratio, and
        whether it is kept; a sentence for a step without a budget.
        """
        rows = decisions(self.graph)
        return decision_table(rows) if rows else "nothing is recomputed for a budget (see Remat)"

    def pass_table(self) -> str:
        """What each pass did: milliseconds, ops that there are more and fewer of, whether nodes changed places."""
        return pass_table(self.passes)
