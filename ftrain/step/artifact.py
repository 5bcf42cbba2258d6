"""A compiled step: the graph after its passes, and what is known about it before it runs (memory, cost, schedule)."""

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
    """What a trace and the passes yield; `Step.lower` returns it, a `Runner` runs it.

    - `name`: of the function. `traced`: the trace.
    - `graph`: after all passes but those that bring it to the form that runs (see `executed`).
    - `setting`: what the passes were told. `passes`: what each of them did.
    - `signature`: the arguments it is for. `donation`: the leaves that the new state is written over.
    - `placements`: on a mesh, where the pieces of each result are.
    - `seconds_to_compile`: of the trace and the passes.
    - `recompile(remat=..., observe=...)`: traces and plans the same step anew, with these options changed.
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
        """Positions of the argument leaves that the step writes its new state over."""
        return [self.signature.slots[slot] for slot in self.donation.slots]

    def memory(self) -> MemoryPlan:
        """The memory plan: bytes alive over the run, the peak, and what is alive at it. On CUDA also the bytes that the
        allocator reserves for it.

        >>> import torch, ftrain
        >>> plan = ftrain.jit(lambda x: (x * 2).sum()).lower(torch.zeros(1024)).memory()
        >>> plan.inputs, plan.peak >= 4096  # 1,024 float32 values in, as many in between
        (4096, True)
        """
        plan = plan_memory(self.executed, round_to=self.setting.granularity)
        if self.setting.device.type != "cuda":
            return plan
        return replace(plan, libraries=CUBLAS_WORKSPACE, reserved_share=reserved_over_allocated())

    def cost(self) -> Cost:
        """FLOPs, and bytes read and written, of each node and in all.

        >>> import torch, ftrain
        >>> ftrain.jit(lambda a, b: a @ b).lower(torch.zeros(4, 8), torch.zeros(8, 2)).cost().flops  # 2 x 4 x 8 x 2
        128
        """
        return graph_cost(self.graph)

    @property
    def executed(self) -> fx.GraphModule:
        """The graph as it runs: with writes in place, and under a compiler with each run of ops that it fuses as one
        node.
        """
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
        """Compute `executed` and `interpreted` anew when they are next asked for: the graph was repaired."""
        self._forms.clear()

    def as_text(self) -> str:
        """The graph as text, a line per node: name, type, op and arguments, then phase, parameter path, source line and
        the bytes alive.

        >>> import torch, ftrain
        >>> print(ftrain.jit(lambda x: x.relu()).lower(torch.zeros(3)).as_text().splitlines()[0])
        x: float32[3]...
        """
        return graph_text(self.executed)

    def report(self, file: str | Path, *, title: str = "") -> Path:
        """Write an HTML page about the step: totals, memory over time, costs, the graph. Returns the path of the file.

        `file`: missing folders are made. `title`: the heading, such as the model and the run; default: the step's name.

        >>> import tempfile, torch, ftrain
        >>> compiled = ftrain.jit(lambda x: x.relu()).lower(torch.zeros(3))
        >>> compiled.report(f"{tempfile.mkdtemp()}/step.html").name
        'step.html'
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
        """The simulated schedule: when each collective starts and ends, what it overlaps, and the microseconds that
        compute waits for it.

        `link`: default the plan's. Empty without a mesh.

        >>> import torch, ftrain
        >>> ftrain.jit(lambda x: x.relu()).lower(torch.zeros(3)).schedule().messages
        []
        """
        mesh, times = self.setting.mesh, OpTimes.on(self.setting.device)
        if mesh is None:
            return Schedule([], 0.0, 0.0, 0.0)
        return simulate_schedule(self.graph, mesh, times=times, link=link or self.setting.link)

    def bytes_moved(self) -> Mapping[str, int]:
        """Bytes that a rank sends in one step, by purpose (`fsdp_gather`, `ulysses`, ...); empty without a mesh.

        >>> import torch, ftrain
        >>> ftrain.jit(lambda x: x.relu()).lower(torch.zeros(3)).bytes_moved()
        {}
        """
        return {} if self.setting.mesh is None else bytes_moved(self.graph, self.setting.mesh)

    def remat_table(self) -> str:
        """What was decided about recompute, as text: each tensor that the backward needs, its MB, microseconds,
        microseconds per MB, and whether it is kept. One sentence for a step without a budget.

        >>> import torch, ftrain
        >>> ftrain.jit(lambda x: x.relu()).lower(torch.zeros(3)).remat_table()
        'nothing is recomputed for a budget (see Remat)'
        """
        rows = decisions(self.graph)
        return decision_table(rows) if rows else "nothing is recomputed for a budget (see Remat)"

    def pass_table(self) -> str:
        """What each pass did, a line per pass: milliseconds, ops added and removed, and whether nodes were reordered.

        >>> import torch, ftrain
        >>> print(ftrain.jit(lambda x: x.relu()).lower(torch.zeros(3)).pass_table())
        join_waits ... ms ...
        """
        return pass_table(self.passes)
