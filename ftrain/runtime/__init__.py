"""Running a graph: backends, lockstep, donated and borrowed leaves, and who else holds their memory.

Names are loaded when they are first asked for. A function that has the name of its module is imported from there.
"""

import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

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
_PLACE_OF = {name: module for module, names in _PLACES.items() for name in names}

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


def __getattr__(name: str) -> _Any:
    if name in _PLACE_OF:
        return getattr(_importlib.import_module(f"ftrain.runtime.{_PLACE_OF[name]}"), name)
    raise AttributeError(f"ftrain.runtime has no {name!r}; it has {', '.join(__all__)}")
