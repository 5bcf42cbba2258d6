"""What a person reads of a step: the page, the graph as text, why it ran out of memory.

Names are loaded when they are first asked for. A function that has the name of its module is imported from there.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names as _lazy_names

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

__getattr__ = _lazy_names(__name__, _PLACES)
