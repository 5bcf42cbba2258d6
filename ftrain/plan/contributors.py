"""Which ops the time of a step goes to, in terms that graphs of any depth share, and the text that explains it."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import fx

from ftrain.analysis.op_times import OpTimes
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.text import op_name

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
FAR = 1.5  # a step that takes so many times its bound is explained


class Contributor(NamedTuple):
    """An op of a phase on the parameters of one part of all layers. `path`: up to that part, without layer numbers."""

    op: str
    path: str
    phase: str


def contributors(module: fx.GraphModule, times: OpTimes) -> dict[Contributor, float]:
    """Microseconds of compute of each contributor in the graph `module`, by the `times` of its ops. An op in a loop
    counts as often as it runs.
    """
    found: dict[Contributor, float] = {}
    for node in module.graph.nodes:
        if is_loop(node):
            inner = {c: int(node.args[1]) * took for c, took in contributors(loop_body(node), times).items()}
        else:
            part = _part(node.meta.get("path") or "")
            inner = {Contributor(op_name(node), part, node.meta.get("phase") or ""): times.microseconds(node)}
        for c, took in inner.items():
            if took:
                found[c] = found.get(c, 0.0) + took
    return found


def _part(path: str) -> str:
    """`a.layers.3.attention.w_q` belongs to `a.layers.*.attention`; a path without numbers stays whole."""
    names = _NUMBER.sub(".*", path).split(".")
    last = max((i for i, name in enumerate(names) if name == "*"), default=len(names))
    return ".".join(names[: last + 2])


def why(seconds: float, bound: float, exposed: float, ops: Mapping[Contributor, float], *, rows: int = 8) -> str:
    """What a step of `seconds` spends its time on, if its lower bound is `bound` seconds; empty if it takes less than
    `FAR` times that.

    `ops`: microseconds of each contributor, of which the largest `rows` are listed; `exposed`: seconds of messages that
    compute waits for.
    """
    if seconds < FAR * bound:
        return ""
    largest = sorted(ops.items(), key=lambda item: -item[1])[:rows]
    lines = [
        f"{seconds * 1e3:.0f} ms a step, {seconds / bound:.1f} times the {bound * 1e3:.0f} ms that products and "
        "messages of the model take at least; most of it:"
    ]
    lines += [
        f"  {took / 1e3:8.0f} ms  {c.op} of {c.path or 'no parameter'} ({c.phase or 'step'})" for c, took in largest
    ]
    others = sum(ops.values()) - sum(took for _, took in largest)
    lines.append(f"  {others / 1e3:8.0f} ms  {max(0, len(ops) - rows)} other kinds of ops")
    lines.append(f"  {exposed * 1e3:8.0f} ms  messages that compute waits for")
    return "\n".join(lines)
