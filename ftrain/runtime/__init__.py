"""Running a graph: backends, lockstep, donated and borrowed leaves, and who else holds their memory.

Names are loaded when they are first asked for. A function that has the name of its module is imported from there.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from ftrain.runtime.borrow import Borrow, Fence, borrowable, plain_leaves
    from ftrain.runtime.cudagraph import cudagraph_program
    from ftrain.runtime.donation import give_away, is_donated
    from ftrain.runtime.execute import choose, compile_graph, python_program, require_backend
    from ftrain.runtime.host_copy import HostCopy
    from ftrain.runtime.interpret import Iteration, Op, interpret_ranks
    from ftrain.runtime.lockstep import lockstep_program

_PLACES = {
    "borrow": (
        "Borrow",
        "Fence",
        "borrowable",
        "plain_leaves",
    ),
    "cudagraph": ("cudagraph_program",),
    "donation": (
        "give_away",
        "is_donated",
    ),
    "execute": (
        "choose",
        "compile_graph",
        "python_program",
        "require_backend",
    ),
    "host_copy": ("HostCopy",),
    "interpret": (
        "Iteration",
        "Op",
        "interpret_ranks",
    ),
    "lockstep": ("lockstep_program",),
}

__all__ = [
    "Borrow",
    "Fence",
    "HostCopy",
    "Iteration",
    "Op",
    "borrowable",
    "choose",
    "compile_graph",
    "cudagraph_program",
    "give_away",
    "interpret_ranks",
    "is_donated",
    "lockstep_program",
    "plain_leaves",
    "python_program",
    "require_backend",
]

__getattr__ = _lazy_names(__name__, _PLACES)
