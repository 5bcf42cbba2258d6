"""Each pass must keep every value to the bit: a step runs after each of them, and results are compared."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.analysis.liveness import plan_memory
from ftrain.graph.layouts import views_as_reshapes
from ftrain.graph.loop import copy_graph, with_bodies
from ftrain.graph.sizes import expect_sizes
from ftrain.graph.text import show_bytes, show_node
from ftrain.runtime.execute import python_program
from ftrain.runtime.lockstep import lockstep_program
from ftrain.step.api import Step, make_step
from ftrain.step.artifact import Compiled
from ftrain.step.pipeline import DONATED, INTERPRETED, run_passes


@dataclass(frozen=True)
class PassCheck:
    """What a pass did to a step.

    - `changed`: paths of the results whose bits differ from those of the trace.
    - `difference`: a unified diff of the graph's text; empty where the pass changed nothing.
    - `peaks`: bytes beyond the arguments at the peak of the graph before and after the pass, by the memory plan.
    """

    name: str
    changed: tuple[str, ...]
    difference: str
    peaks: tuple[int, int]

    def __str__(self) -> str:
        lines = self.difference.splitlines()[2:]
        more, fewer = (sum(line.startswith(sign) for line in lines) for sign in "+-")
        kept = f"changes {', '.join(self.changed[:3])}" if self.changed else "keeps every bit"
        before, after = map(show_bytes, self.peaks)
        peak = f"peak {before}" if before == after else f"peak {before} -> {after}"
        return f"{self.name:22} +{more} -{fewer} lines, {kept}, {peak}"


def check_passes(step: Step | Callable[..., Any], *args: Any) -> list[PassCheck]:
    """Run the step after each of its passes on these arguments, and compare all results with those of its trace, to the
    bit.

    `step` is jitted or a plain function; `args` are as for a call of it, and are not modified. Random numbers are drawn
    from the same seed each time. On a virtual mesh all ranks run. Returns an entry per pass. ValueError on a mesh of
    processes; RuntimeError, from the `lint` of `torch.fx`, where nodes are not in order.

    >>> import torch, ftrain
    >>> checks = ftrain.debug.check_passes(ftrain.grad(lambda w: (w * w).sum()), torch.ones(3))
    >>> [check.name for check in checks if check.changed]
    []
    """
    step = step if isinstance(step, Step) else make_step(step)
    compiled = step.lower(*args)
    mesh = compiled.setting.mesh
    if mesh is not None and mesh.kind == "process":
        raise ValueError(f"passes are not checked on a mesh of processes: take Mesh({mesh}, kind='virtual')")
    watch = _Watch(compiled, step.rank_inputs(*args))
    recompiled = compiled.recompile(observe=watch.look)
    setting = replace(recompiled.setting, backend="aten")
    run_passes(copy_graph(recompiled.graph), INTERPRETED, setting, observe=watch.look)
    return watch.found


class _Watch:
    """Called after each pass: runs the graph and compares the results."""

    def __init__(self, compiled: Compiled, ranks: list[list[Tensor]]) -> None:
        self._compiled, self._ranks = compiled, ranks
        self._text, self._peak, self._donated = "", 0, False
        self._expected: list[list[Tensor]] = []
        self.found: list[PassCheck] = []

    def look(self, name: str, module: fx.GraphModule) -> None:
        text = "\n".join(show_node(n) for graph in with_bodies(module) for n in graph.graph.nodes)
        for graph in with_bodies(module):
            graph.graph.lint()
        self._donated |= name in {p.name for p in DONATED}
        peaks = self._peak, _peak(module)
        if name == "trace":
            self._expected = self._run(module)
        elif text == self._text:
            self.found.append(PassCheck(name, (), "", peaks))
        else:
            lines = difflib.unified_diff(self._text.splitlines(), text.splitlines(), "before", "after", lineterm="")
            self.found.append(PassCheck(name, self._changed(self._run(module)), "\n".join(lines), peaks))
        self._text, self._peak = text, peaks[1]

    def _changed(self, results: list[list[Tensor]]) -> tuple[str, ...]:
        paths = self._compiled.traced.output_paths
        pairs = list(zip(self._expected, results, strict=True))
        return tuple(p for i, p in enumerate(paths) if not all(_same_bits(a[i], b[i]) for a, b in pairs))

    def _run(self, module: fx.GraphModule) -> list[list[Tensor]]:
        """The results of every rank, on copies of the arguments."""
        module = copy_graph(module)
        for each in with_bodies(module):
            views_as_reshapes(each)
        ranks = [[x.clone() for x in inputs] for inputs in self._ranks]
        mesh, donation = self._compiled.setting.mesh, self._compiled.donation
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            if mesh is not None and mesh.kind == "virtual":
                outputs = lockstep_program(module, mesh)(ranks)
            else:
                outputs = [python_program(module)(ranks[0])]
        if not self._donated:
            return outputs
        return [
            donation.ordered([own[slot] for slot in donation.slots], out)
            for own, out in zip(ranks, outputs, strict=True)
        ]


def _peak(module: fx.GraphModule) -> int:
    """Bytes beyond the arguments at the peak; sizes that depend on data count with their expected value."""
    module = copy_graph(module)
    for each in with_bodies(module):
        expect_sizes(each)
    return plan_memory(module).peak


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    x = x.detach().contiguous()
    return x.view(-1).view(torch.uint8) if x.numel() else x
