"""Memory that a step writes over must belong to one leaf alone. This is checked at every call, since leaves change."""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ftrain.graph.torch_memory import addresses_equal


class _Span(NamedTuple):
    """The bytes that a tensor covers, and which tensor it is: its position in the arguments, or -1 - the number of a
    captured one.
    """

    start: int
    end: int
    slot: int


_NOTHING = _Span(-1, -1, 0)


class SharedMemory:
    """Looks for other tensors on the memory of donated leaves.

    In the steady state every leaf except the batch is at its old address, and a comparison of addresses is enough.
    """

    def __init__(self, paths: Sequence[str], donated: Collection[int], captured: Mapping[str, Tensor]) -> None:
        """`paths`: of the leaves; `donated`: positions of those written over. `captured`: tensors that the step
        captures, by name.
        """
        self._paths, self._donated = paths, frozenset(donated)
        self._slots = sorted(self._donated)
        self._others = [slot for slot in range(len(paths)) if slot not in self._donated]
        self._names, self._captured = list(captured), list(captured.values())
        self._last: list[int] = []
        self._written: list[_Span] = []

    def require_none(self, leaves: Sequence[Tensor], *, contiguous: bool) -> None:
        """ValueError that names two tensors on the same memory, of which the step writes over one.

        `leaves`: of any shapes. `contiguous`: all of them are known to be contiguous.
        """
        if contiguous and self._last and addresses_equal(leaves, self._last, self._slots):
            moved = [i for i in self._others if leaves[i].data_ptr() != self._last[i]]
            self._look_at(_spans(leaves, moved))
            for slot in moved:
                self._last[slot] = leaves[slot].data_ptr()
            return
        self._look_at_all(leaves)
        self._last = [*map(Tensor.data_ptr, leaves)] if contiguous else []

    def _look_at_all(self, leaves: Sequence[Tensor]) -> None:
        others = (_Span(s.start, s.end, -1 - s.slot) for s in _spans(self._captured, range(len(self._captured))))
        spans = sorted([*_spans(leaves, range(len(leaves))), *others])
        last = last_written = _NOTHING
        for span in spans:
            before = last if span.slot in self._donated else last_written
            if before.end > span.start:
                self._refuse(before, span)
            last = max(last, span, key=_end)
            if span.slot in self._donated:
                last_written = max(last_written, span, key=_end)
        self._written = [s for s in spans if s.slot in self._donated]

    def _look_at(self, spans: Iterable[_Span]) -> None:
        """Compare tensors that are not written over with those that are, which are at their old addresses."""
        for span in spans:
            at = bisect_right(self._written, span.end - 1, key=_start)
            if at and self._written[at - 1].end > span.start:
                self._refuse(self._written[at - 1], span)

    def _refuse(self, a: _Span, b: _Span) -> None:
        first, second = sorted((a.slot, b.slot), key=lambda slot: slot if slot >= 0 else len(self._paths) - slot)
        if second < 0:
            raise ValueError(
                f"{self._paths[first]!r} and {self._names[-1 - second]}, which the step captures, share memory, and "
                "the step writes its new state over it: pass a copy of one of them"
            )
        raise ValueError(
            f"{self._paths[first]!r} and {self._paths[second]!r} share memory, and the step writes its new state "
            "over it: keep a tied weight at one place of the tree, or clone one of them"
        )


def _start(span: _Span) -> int:
    return span.start


def _end(span: _Span) -> int:
    return span.end


def _spans(tensors: Sequence[Tensor], slots: Iterable[int]) -> Iterator[_Span]:
    for slot in slots:
        tensor = tensors[slot]
        if tensor.numel():
            reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            yield _Span(start := tensor.data_ptr(), start + reach * tensor.element_size(), slot)
