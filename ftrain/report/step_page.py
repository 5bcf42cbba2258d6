"""The report of a compiled step: one self-contained HTML page."""

import re
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

from torch import fx

from ftrain.analysis.flops import NodeCost, graph_cost
from ftrain.analysis.memory_timeline import inputs_by_argument, memory_timeline
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.text import op_name, short_source, show_bytes, show_node, show_value
from ftrain.remat.fit import decisions
from ftrain.remat.policy import Remat
from ftrain.report.page import Card, Cell, Table, page
from ftrain.report.step_data import StepData
from ftrain.report.timeline import timeline_figure


def write_report(step: StepData, file: str | Path, *, title: str = "") -> Path:
    """Write the page: totals, memory over the run, tensors at the peak, costs by op and component, the graph.

    Makes missing folders; returns the path of the file. `title`: see `report_html`. OSError where the file cannot be
    written.
    """
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report_html(step, title=title), encoding="utf-8")
    return path


def report_html(step: StepData, *, title: str = "") -> str:
    """The page as a string. Its heading is `title`; default: the step's name."""
    memory, cost = step.memory, graph_cost(step.graph)
    samples = memory_timeline(step.executed)
    sections = [
        ("Memory over the run", timeline_figure(samples, inputs_by_argument(step.executed))),
        *([("Counted as the largest possible", "<br>".join(map(escape, memory.unknown)))] if memory.unknown else []),
        *recompute_sections(step),
        (f"Alive at the peak ({memory.peak_node})", peak_table(step).html()),
        ("Cost by component", group_table("component", cost.nodes, lambda n: component(n.path)).html()),
        ("Cost by op", group_table("op", cost.nodes, lambda n: _short_op(n.op)).html()),
        ("Graph", graph_table(step.executed).html()),
    ]
    shapes = [f"{p}: {a}" for p, a in zip(step.traced.input_paths, step.traced.input_avals, strict=True)]
    return page(title or step.name or "step", subtitle(step), shapes, cards(step), sections)


def recompute_sections(step: StepData) -> list[tuple[str, str]]:
    """For a step with a budget: the memory that it would take without recompute, and the table of decisions. Sections
    are (title, HTML).
    """
    found = decisions(step.graph)
    if not found:
        return []
    before = step.recompile(Remat("none")).executed
    rows: list[list[Cell]] = [
        [
            r.decision,
            (r.us_per_mb, f"{r.us_per_mb:,.1f}"),
            (r.bytes, show_bytes(r.bytes)),
            (r.microseconds, f"{r.microseconds:,.1f}"),
            f"{r.op}{list(r.shape)}",
            r.path,
            r.source,
        ]
        for r in found
    ]
    columns = ["decision", "us per MB", "bytes", "us to recompute or fetch", "tensor", "parameter", "source"]
    return [
        ("Memory with nothing recomputed", timeline_figure(memory_timeline(before), inputs_by_argument(before))),
        ("Recompute by return on investment", Table(columns, rows).html()),
    ]


def subtitle(step: StepData) -> str:
    """The arguments in short: the number of leaves of the state, and the leaves of the batch."""
    first = step.traced.input_paths[0].split(".")[0] if step.traced.input_paths else ""
    avals = list(zip(step.traced.input_paths, step.traced.input_avals, strict=True))
    rest = [f"{p} {a}" for p, a in avals if p.split(".")[0] != first]
    count = sum(p.split(".")[0] == first for p, _ in avals)
    hidden = f", and {len(rest) - 8} more" if len(rest) > 8 else ""
    return f"{first}: {count} tensors; {', '.join(rest[:8]) or 'no other tensors'}{hidden}"


def cards(step: StepData) -> list[Card]:
    """The figures at the top of the page."""
    memory, cost = step.memory, graph_cost(step.graph)
    phases = [f"{phase} {show_flops(flops)}" for phase, flops in cost.by_phase.items() if flops]
    inputs = [f"{label} {show_bytes(size)}" for label, size in inputs_by_argument(step.executed).items()]
    count = _count_nodes(step.executed)
    return [
        Card("Compute", show_flops(cost.flops), " · ".join(phases)),
        Card("Peak above inputs", show_bytes(memory.peak), f"at {memory.peak_node}; {show_bytes(memory.total)} in all"),
        *([Card("On the host", show_bytes(memory.host), "offloaded tensors at their most")] if memory.host else []),
        Card("Inputs", show_bytes(memory.inputs), f"{' · '.join(inputs[:4])}; {step.written} written in place"),
        Card("Bytes moved", show_bytes(cost.bytes), f"{cost.flops / max(cost.bytes, 1):.3g} FLOPs per byte"),
        Card("Graph", f"{count:,} nodes", f"traced and planned in {step.seconds_to_compile:.2f} s"),
        Card("Backend", step.backend, f"on {_devices(step)}"),
    ]


def peak_table(step: StepData, limit: int = 60) -> Table:
    """What is alive at the peak, largest first, at most `limit` rows."""
    memory = step.memory
    nodes = {n.name: n for n in all_nodes(step.executed)}
    rows: list[list[Cell]] = []
    for tensor in memory.top[:limit]:
        node = nodes[tensor.node]
        share = tensor.bytes / max(memory.peak, 1)
        value = show_value(node.meta.get("val"))
        source = short_source(node.meta.get("source"))
        rows.append(
            [(tensor.bytes, show_bytes(tensor.bytes)), (share, f"{share:.1%}"), tensor.node, value, tensor.phase]
        )
        rows[-1] += [tensor.path, source]
    return Table(["bytes", "share", "made by", "type", "phase", "parameter", "source"], rows)


class Group(NamedTuple):
    """The sum over some nodes: their number, FLOPs by phase and in all, bytes read and written."""

    nodes: int = 0
    forward: int = 0
    backward: int = 0
    flops: int = 0
    bytes: int = 0

    def add(self, node: NodeCost) -> "Group":
        """The sum with one more node."""
        forward = self.forward + node.flops * (node.phase == "forward")
        backward = self.backward + node.flops * (node.phase == "backward")
        return Group(self.nodes + 1, forward, backward, self.flops + node.flops, self.bytes + node.bytes)


def group_table(label: str, nodes: Iterable[NodeCost], key: Callable[[NodeCost], str]) -> Table:
    """Costs of nodes summed by a key; most FLOPs first, then most bytes. `label`: the heading of the key's column."""
    groups: dict[str, Group] = {}
    for node in nodes:
        groups[key(node)] = groups.get(key(node), Group()).add(node)
    ordered = sorted(groups.items(), key=lambda item: (item[1].flops, item[1].bytes), reverse=True)
    flops, moved = (max(sum(getattr(g, f) for g in groups.values()), 1) for f in ("flops", "bytes"))
    rows: list[list[Cell]] = [
        [
            name,
            (g.nodes, f"{g.nodes:,}"),
            (g.forward, show_flops(g.forward)),
            (g.backward, show_flops(g.backward)),
            (g.flops / flops, f"{g.flops / flops:.1%}"),
            (g.bytes, show_bytes(g.bytes)),
            (g.bytes / moved, f"{g.bytes / moved:.1%}"),
        ]
        for name, g in ordered
    ]
    return Table([label, "nodes", "forward", "backward", "of FLOPs", "bytes moved", "of bytes"], rows)


def graph_table(module: fx.GraphModule) -> Table:
    """Every node, in the order in which they run, with the bytes alive."""
    alive = {(s.loop, s.node.name): s.total for s in memory_timeline(module)}
    rows: list[list[Cell]] = []
    for node, loops in walk(module):
        total = alive.get((" ".join(loops), node.name))
        indent = "\u2003" * len(loops)
        rows.append([indent + show_node(node), node.meta.get("phase", ""), node.meta.get("path") or ""])
        rows[-1] += [short_source(node.meta.get("source")), (total or 0, "" if total is None else show_bytes(total))]
    return Table(["node", "phase", "parameter", "source", "alive"], rows, searchable=True, mono=True)


def walk(module: fx.GraphModule, inside: tuple[str, ...] = ()) -> Iterable[tuple[fx.Node, tuple[str, ...]]]:
    """All nodes of the graph except outputs, each with the names of the loops that enclose it (those of `inside`
    first). The body of a loop follows its node.
    """
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        yield node, inside
        if is_loop(node):
            yield from walk(loop_body(node), (*inside, node.name))


def all_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes of the graph and of the bodies of its loops."""
    return [node for node, _ in walk(module)]


def component(path: str) -> str:
    """The part of the model that a parameter path belongs to: layers together, without the leaf's name.

    >>> from ftrain.report.step_page import component
    >>> component("state.params.foundation.layers.3.moe.w_EDF")
    'foundation.layers.*.moe'
    """
    parts = ["*" if re.fullmatch(r"\d+", p) else p for p in path.split(".")]
    if len(parts) > 2 and parts[1] in ("params", "opt_state"):
        parts = parts[2:] if parts[1] == "params" else parts[1:]
    return ".".join(parts[:-1][:4] or parts) or "(none)"


def show_flops(count: float) -> str:
    """FLOPs with a decimal unit; a dash for none.

    >>> from ftrain.report.step_page import show_flops
    >>> show_flops(2_100_000_000)
    '2.1 GFLOP'
    """
    if not count:
        return "–"
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} PFLOP"


def _short_op(name: str) -> str:
    return name.removeprefix("aten.").removesuffix(".default")


def _count_nodes(module: fx.GraphModule) -> int:
    return sum(bool(op_name(n)) for n in all_nodes(module))


def _devices(step: StepData) -> str:
    return ", ".join(sorted({str(a.device) for a in step.traced.input_avals})) or "no device"
