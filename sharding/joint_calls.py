"""What all ranks of a run call together, in one order. Each process keeps a log of its own such calls.

Two ranks whose logs differ wait for each other at different places, and would do so until a timeout:
`ftrain.run.peers` compares the logs of ranks that wait. A call notes itself before it waits, which costs less than a
microsecond. The calls are those of the process's main thread, so there is one log in a process.
"""

import threading
from collections import deque
from typing import NamedTuple

import torch.distributed as dist

_KEPT = 64
_log: deque[tuple[int, str]] = deque(maxlen=_KEPT)


class JointCall(NamedTuple):
    """A call: its `number` in this process (the first has 1), and `what` it does, in the past tense."""

    number: int
    what: str


def joint_call(what: str) -> None:
    """Note a call that all ranks make together, before it waits for one of them.

    `what`: as in "saved step 3", after "rank 1"; the same words on all ranks. Nothing is noted outside of
    torch.distributed and in other threads than the main one, which no other rank waits for.
    """
    if dist.is_initialized() and threading.current_thread() is threading.main_thread():
        _log.append((calls_made() + 1, what))


def calls_made() -> int:
    """How many calls this process has noted."""
    return _log[-1][0] if _log else 0


def last_calls() -> list[JointCall]:
    """The last calls of this process, at most 64, in order. Any thread may ask."""
    return [JointCall(number, what) for number, what in list(_log)]


def first_difference(own: list[JointCall], other: list[JointCall]) -> tuple[JointCall, JointCall] | None:
    """Of two ranks' logs, the first calls of one number that are not the same call; None where there are none.

    >>> from ftrain.sharding.joint_calls import JointCall, first_difference
    >>> own = [JointCall(1, "called the step"), JointCall(2, "saved step 1")]
    >>> first_difference(own, [JointCall(1, "called the step"), JointCall(2, "left the session")])
    (JointCall(number=2, what='saved step 1'), JointCall(number=2, what='left the session'))
    >>> first_difference(own, own[:1])
    """
    whats = {call.number: call for call in other}
    return next(((call, whats[call.number]) for call in own if whats.get(call.number, call) != call), None)
