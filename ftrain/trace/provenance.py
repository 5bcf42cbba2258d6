"""The provenance of nodes: source line, phase, and for a backward node its forward op.

During a trace, a dispatch mode above the tracer marks every node that an op creates. Autograd numbers forward ops
(`sequence_nr`) and keeps the number on their backward nodes. A prehook on each backward node tells the mode which
forward op is being differentiated.
"""

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from ftrain.graph.source import SourceLine, user_source
from ftrain.graph.torch_private import (
    DEVICE_QUERY,
    device_of_fake,
    next_seq_nr,
    node_of,
    tracing_graph,
)
from ftrain.sharding.spmd import current_filled, current_purpose
from ftrain.trace.fixed_numbers import READ, FixedNumbers
from ftrain.trace.origins import Origins
from ftrain.trace.own_draws import TorchDraws
from ftrain.trace.unseen_writes import UnseenWrites


def sources(node: fx.Node) -> Iterator[fx.Node]:
    """A node and all nodes that it was computed from, nearest first. The graph may still be under construction."""
    queue, seen = deque([node]), {node}
    while queue:
        current = queue.popleft()
        yield current
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue.extend(fresh)


def backward_nodes(loss: Tensor) -> Iterator[Any]:
    """The nodes of autograd's graph behind `loss` (0-d), each once."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(parent for parent, _ in node.next_functions)


class Provenance(TorchDispatchMode):
    """A dispatch mode that marks new nodes with their provenance in `meta`.

    - `source`: the user's line. `phase`: "forward", "backward" or "step".
    - `seq_nr`: a number that a forward op shares with the nodes of its backward.
    - `purpose`: of collectives and the nodes around them (see `ftrain.sharding.spmd.purpose`).
    - `filled`: the filled share of a padded batch (see `ftrain.sharding.spmd.filled`).

    `draws`, if given, checks the random ops of the trace. The mode also raises the ValueErrors of `UnseenWrites`.
    """

    def __init__(self, draws: TorchDraws | None = None) -> None:
        super().__init__()
        self._draws = draws
        self.phase = "step"
        self.made: list[weakref.ref[Tensor]] = []
        """Weak references to the tensors of the trace."""
        self.trained: list[Tensor] = []
        """Leaves of losses that require a gradient and are not differentiated."""
        self.origins = Origins()
        """Tells which tensors depend on the arguments or on random numbers."""
        self._fixed = FixedNumbers()
        self._unseen = UnseenWrites(self.made, user_source)
        self._source_of_seq_nr: dict[int, SourceLine | None] = {}
        self._transposed: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_QUERY:
            return device_of_fake(args[0])
        number = self._fixed.find(args[0]) if func is READ else None
        if number is not None:
            return number
        if self.phase != "backward":
            self._unseen.check(func, args)
        if self._draws is not None:
            self._draws.check(func, args, kwargs or {})
        graph = tracing_graph()
        before = len(graph.nodes) if graph is not None else 0
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, list | tuple) else (out,):
            if isinstance(made, Tensor):
                self.made.append(weakref.ref(made))
        if graph is not None and len(graph.nodes) > before:
            seq_nr, source = self._origin()
            purpose, filled = current_purpose(), current_filled()
            new = [node for _, node in zip(range(len(graph.nodes) - before), reversed(graph.nodes), strict=False)]
            self.origins.note(func, new[::-1], out)
            self._fixed.note(func, args, kwargs or {}, new[0])
            for node in new:
                node.meta.update(source=source, phase=self.phase, seq_nr=seq_nr)
                if purpose:
                    node.meta["purpose"] = purpose
                if filled != 1:
                    node.meta["filled"] = filled
        return out

    def note_copy(self, copy: Tensor, path: str) -> None:
        """A loss computes with `copy`, of any shape, in the place of the parameter at `path`; no op may write it."""
        if node_of(copy) is not None:
            self._unseen.note_copy(copy, path)

    def _origin(self) -> tuple[int, SourceLine | None]:
        """The number and the line of the forward op that is computed or differentiated now."""
        if self._transposed is not None:
            return self._transposed, self._source_of_seq_nr.get(self._transposed)
        seq_nr, source = next_seq_nr() - 1, user_source()
        self._source_of_seq_nr.setdefault(seq_nr, source)  # later ops without gradients have the same number
        return seq_nr, source

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        """Nodes created within the block belong to `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase, self._transposed = before, None

    def watch_backward(self, loss: Tensor, leaves: Sequence[Tensor] = ()) -> None:
        """Register prehooks on the backward of `loss` (0-d) that report the forward op of each backward node.

        Leaves of the loss, of any shape, that require a gradient and are not among `leaves` are added to `trained`.
        """
        asked = set(map(id, leaves))
        for node in backward_nodes(loss):
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor) and id(leaf) not in asked:
                self.trained.append(leaf)
            number = node._sequence_nr()
            node.register_prehook(lambda grads, number=number: self._enter(number))

    def _enter(self, seq_nr: int) -> None:
        self._transposed = seq_nr


_current: ContextVar[Provenance | None] = ContextVar("ftrain_provenance", default=None)


def current_provenance() -> Provenance | None:
    """The mode of the current trace; None in eager code."""
    return _current.get()


@contextmanager
def recording(draws: TorchDraws | None = None) -> Iterator[Provenance]:
    """Record the provenance of the trace within the block; `draws`, if given, checks its random ops."""
    mode = Provenance(draws)
    token = _current.set(mode)
    try:
        with mode:
            yield mode
    finally:
        _current.reset(token)
