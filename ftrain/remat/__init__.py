"""What the backward recomputes, or fetches from the host, instead of keeping it.

Names are loaded when they are first asked for. A function that has the name of its module is imported from there.
"""

import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from ftrain.remat.fit import Decision, DecisionRow, ImpossibleBudget, decision_table, decisions
    from ftrain.remat.planner import bytes_within
    from ftrain.remat.policy import (
        Remat,
        is_forward,
        must_keep,
        parse_budget,
        recompute,
        rematerialize,
        require_matches,
    )

_PLACES = {
    "fit": (
        "Decision",
        "DecisionRow",
        "ImpossibleBudget",
        "decision_table",
        "decisions",
    ),
    "planner": ("bytes_within",),
    "policy": (
        "Remat",
        "is_forward",
        "must_keep",
        "parse_budget",
        "recompute",
        "rematerialize",
        "require_matches",
    ),
}
_PLACE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Decision",
    "DecisionRow",
    "ImpossibleBudget",
    "Remat",
    "bytes_within",
    "decision_table",
    "decisions",
    "is_forward",
    "must_keep",
    "parse_budget",
    "recompute",
    "rematerialize",
    "require_matches",
]


def __getattr__(name: str) -> _Any:
    if name in _PLACE_OF:
        return getattr(_importlib.import_module(f"ftrain.remat.{_PLACE_OF[name]}"), name)
    raise AttributeError(f"ftrain.remat has no {name!r}; it has {', '.join(__all__)}")
