"""What every thread of this process is doing, in text: for the report of a run that hangs."""

import linecache
import sys
import threading
import traceback
from types import FrameType

from torch import fx

from ftrain.graph.collectives import COLLECTIVES, WAIT
from ftrain.runtime.lost_rank import describe


def thread_stacks() -> str:
    """The Python stack of each thread, the main thread's first, innermost call last; a line for the collective that
    a graph stands at."""
    frames = sys._current_frames()
    names = {t.ident: t.name for t in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    for ident in sorted(frames, key=lambda i: (i != main, names.get(i, ""))):
        if ident == threading.get_ident():
            continue
        stack = "".join(traceback.format_stack(frames[ident]))
        at = collective_under_way(frames[ident])
        parts.append(f"thread {names.get(ident, '?')} ({ident}):\n{stack}" + (f"  stands at {at}\n" if at else ""))
    return "\n".join(parts)


def collective_under_way(frame: FrameType | None) -> str | None:
    """The innermost collective of a step's graph that a stack is inside of, in words; None if it is in none."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_filename.startswith("<eval_with_key>"):
            node = _node_at(frame.f_locals.get("self"), linecache.getline(code.co_filename, frame.f_lineno))
            if node is not None:
                return describe(node)
        frame = frame.f_back
    return None


def _node_at(module: object, line: str) -> fx.Node | None:
    if not isinstance(module, fx.GraphModule):
        return None
    name = line.strip().split(" = ")[0]
    node = next((n for n in module.graph.nodes if n.name == name), None)
    if node is not None and node.target is WAIT:
        node = node.all_input_nodes[0]
    return node if node is not None and node.target in COLLECTIVES else None
