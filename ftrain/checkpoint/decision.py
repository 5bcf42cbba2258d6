"""What all ranks do alike: rank 0 looks and decides, the others do the same, or raise the same."""

import json
from collections.abc import Callable
from typing import Any

from ftrain.checkpoint.errors import SaveFailed
from ftrain.checkpoint.ranks import Ranks
from ftrain.checkpoint.report import Report, words

_TOPIC = "go"
_ERRORS: tuple[type[Exception], ...] = (SaveFailed, ValueError, RuntimeError)


def decide(ranks: Ranks, round_number: int, function: Callable[[], Any]) -> Any:
    """On rank 0: what `function` finds, told to the others, which call `wait_for_decision`.

    Args:
        ranks: the processes that decide together.
        round_number: of this decision, the same on all ranks (see `Ranks.next_round`).
        function: what it returns must be a value that JSON has.

    Raises:
        Exception: whatever `function` raises; the others are told its words, and raise too.
        TypeError: JSON has no such value as was found.
    """
    try:
        found = function()
    except BaseException as error:
        ranks.publish(round_number, _TOPIC, _error(error))
        raise
    ranks.publish(round_number, _TOPIC, json.dumps({"found": found}))
    return found


def wait_for_decision(ranks: Ranks, round_number: int, before_raising: Callable[[], None] = lambda: None) -> Any:
    """On another rank: what rank 0 found (of JSON).

    Raises:
        SaveFailed, ValueError, RuntimeError: what rank 0 has raised, with its words, after `before_raising`; also
            RuntimeError when rank 0 no longer answers.
        TimeoutError: it lives and decides nothing.
    """
    told = json.loads(ranks.wait_for(round_number, _TOPIC, 0))
    if "error" in told:
        before_raising()
        raise _ERRORS[told["kind"]](told["error"])
    return told["found"]


def of_main(ranks: Ranks, function: Callable[[], Any], what: str) -> Any:
    """What `function` finds on rank 0, on all ranks; they call this together. `what`: in words, see
    `ftrain.sharding.joint_calls`.
    """
    round_number = ranks.next_round(what)
    return decide(ranks, round_number, function) if ranks.rank == 0 else wait_for_decision(ranks, round_number)


def refuse(ranks: Ranks, round_number: int, error: ValueError) -> None:
    """Before the decision: this rank cannot take part, and the others are not to wait for it."""
    if ranks.rank == 0:
        ranks.publish(round_number, _TOPIC, _error(error))
    else:
        ranks.publish(round_number, "done", Report.of(error).text())


def all_done(ranks: Ranks, error: BaseException | None) -> None:
    """Return when all ranks have come here without an error; they call this together.

    Raises:
        RuntimeError: another rank has come here with an error; it is named. (This one's own is raised by its caller.)
    """
    if ranks.world == 1:
        return
    round_number = ranks.next_round("ended a restore")
    if ranks.rank == 0:
        told = [Report() if error is None else Report.of(error)]
        told += [Report.parse(ranks.wait_for(round_number, "done", rank)) for rank in range(1, ranks.world)]
        failed = [f"rank {rank}: {report.error}" for rank, report in enumerate(told) if report.error is not None]
        ranks.publish(round_number, "end", json.dumps(failed))
    else:
        ranks.publish(round_number, "done", (Report() if error is None else Report.of(error)).text())
        failed = json.loads(ranks.wait_for(round_number, "end", 0))
    if failed and error is None:
        raise RuntimeError(f"not all ranks could restore: {'; '.join(failed)}")


def _error(error: BaseException) -> str:
    kind = next((i for i, known in enumerate(_ERRORS) if isinstance(error, known)), len(_ERRORS) - 1)
    return json.dumps({"error": str(error) if isinstance(error, _ERRORS) else words(error), "kind": kind})
