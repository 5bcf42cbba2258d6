"""What a person reads of a step: the page, the graph as text, why it ran out of memory.

Names are loaded when they are first asked for. A function that has the name of its module is imported from there.
"""

import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from ftrain.report.graph_text import graph_text
    from ftrain.report.out_of_memory import OutOfMemory, explain_oom, explained, is_out_of_memory
    from ftrain.report.page import Card, Cell, Table
    from ftrain.report.step_data import Described, StepData
    from ftrain.report.step_page import write_report

_PLACES = {
    "graph_text": ("graph_text",),
    "out_of_memory": (
        "OutOfMemory",
        "explain_oom",
        "explained",
        "is_out_of_memory",
    ),
    "page": (
        "Card",
        "Cell",
        "Table",
    ),
    "step_data": (
        "Described",
        "StepData",
    ),
    "step_page": ("write_report",),
}
_PLACE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Card",
    "Cell",
    "Described",
    "OutOfMemory",
    "StepData",
    "Table",
    "explain_oom",
    "explained",
    "graph_text",
    "is_out_of_memory",
    "write_report",
]


def __getattr__(name: str) -> _Any:
    if name in _PLACE_OF:
        return getattr(_importlib.import_module(f"ftrain.report.{_PLACE_OF[name]}"), name)
    raise AttributeError(f"ftrain.report has no {name!r}; it has {', '.join(__all__)}")
