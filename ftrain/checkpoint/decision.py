"""Whether a save is begun: rank 0 decides, the others do the same, or raise the same."""

import json
from collections.abc import Callable

from ftrain.checkpoint.errors import SaveFailed
from ftrain.checkpoint.ranks import Ranks
from ftrain.checkpoint.report import Report

_TOPIC = "go"
_ERRORS: tuple[type[Exception], ...] = (SaveFailed, ValueError)


def decide(ranks: Ranks, turn: int, function: Callable[[], bool]) -> bool:
    """On rank 0: what `function` finds, told to the others; so is the `SaveFailed` or `ValueError` it raises."""
    try:
        begun = function()
    except BaseException as error:
        kind = next((i for i, known in enumerate(_ERRORS) if isinstance(error, known)), 0)
        ranks.say(turn, _TOPIC, json.dumps({"error": str(error), "kind": kind}))
        raise
    ranks.say(turn, _TOPIC, json.dumps({"begun": begun}))
    return begun


def heard_decision(ranks: Ranks, turn: int, before_raising: Callable[[], None]) -> bool:
    """On another rank: what rank 0 found; an error of rank 0 is raised here too, after `before_raising`."""
    found = json.loads(ranks.hear(turn, _TOPIC, 0))
    if "error" in found:
        before_raising()
        raise _ERRORS[found["kind"]](found["error"])
    return found["begun"]


def refuse(ranks: Ranks, turn: int, error: ValueError) -> None:
    """Before the decision: this rank cannot take part, and the others are not to wait for it."""
    if ranks.rank == 0:
        ranks.say(turn, _TOPIC, json.dumps({"error": str(error), "kind": _ERRORS.index(ValueError)}))
    else:
        ranks.say(turn, "done", Report.of(error).text())
