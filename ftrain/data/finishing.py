"""What only the process does that trains on a group, such as decoding media, by threads a step ahead."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ftrain.data.documents import Group
from ftrain.data.rejects import BadRow, Rejects

Finish = Callable[[Group], Group]
"""From a group of `encode` to one with the same tokens. BadRow for a group that cannot be trained on after all."""

_Step = TypeVar("_Step")
_AHEAD = 1  # steps: more of them hold more decoded media in memory


def finished(
    steps: Iterator[_Step],
    own: Callable[[_Step], list[list[Group]]],
    finish: Callable[[int], Finish] | None,
    *,
    threads: int,
    rejects: Rejects,
) -> Generator[tuple[_Step, list[list[Group]]]]:
    """Each step with the groups of this process's packs, finished.

    A group that `finish` refuses is left out of its pack, which has padding in its place, and told to `rejects`: which
    packs there are was said before, to all processes.

    Args:
        steps: in their order.
        own: the groups of each pack of this process, as `encode` made them.
        finish: from the number of a pack among these to what is done with its groups; None leaves them as they are.
        threads: that call it, at least one.
        rejects: of this process.
    """
    if finish is None:
        for step in steps:
            yield step, own(step)
        return
    pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="finish")
    begun: deque[tuple[_Step, list[list[Future[Group]]]]] = deque()
    try:
        for step in steps:
            begun.append((step, [[pool.submit(finish(i), group) for group in p] for i, p in enumerate(own(step))]))
            if len(begun) > _AHEAD:
                yield _results(*begun.popleft(), rejects)
        while begun:
            yield _results(*begun.popleft(), rejects)
    finally:
        pool.shutdown(cancel_futures=True)


def _results(
    step: _Step, packs: Sequence[Sequence[Future[Group]]], rejects: Rejects
) -> tuple[_Step, list[list[Group]]]:
    found: list[list[Group]] = []
    for pack in packs:
        found.append([])
        for future in pack:
            try:
                found[-1].append(future.result())
            except BadRow as error:
                rejects.add(error)
    return step, found
