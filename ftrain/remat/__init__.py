"""What the backward recomputes, or fetches from the host, instead of keeping it.

Names are loaded when they are first asked for. A function that has the name of its module is imported from there.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names as _lazy_names

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

__getattr__ = _lazy_names(__name__, _PLACES)
