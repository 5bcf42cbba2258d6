"""The traces of a jitted function: one for each kind of arguments, at most `MOST_TRACES`."""

import dataclasses
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ftrain.remat.policy import Remat
from ftrain.runtime.donation import is_donated, path_of
from ftrain.runtime.half_new import is_half_new, reason_of
from ftrain.sharding.link import Link
from ftrain.step.artifact import Compiled
from ftrain.step.compile import compile_step, name_of
from ftrain.step.mesh_arguments import COORDINATES
from ftrain.step.runner import Runner
from ftrain.step.sharded import ShardedStep
from ftrain.trace.ambient import AMBIENT_NAMES, ambient
from ftrain.trace.captured import captured_tensors
from ftrain.trace.own_draws import DrawnMeanwhile, watching_this_thread
from ftrain.trace.precision import Precision
from ftrain.trace.surroundings import Surroundings
from ftrain.trace.tracer import Aval, argument_paths, is_array, signature_of
from ftrain.trace.watched import MISSING, Change

MOST_TRACES = 8
"""Traces that a jitted function holds; the oldest is dropped first."""


@dataclass(frozen=True)
class Options:
    """The options of `ftrain.jit`.

    `donate`: the position of the argument that the new state is written over, or None.
    """

    donate: int | None
    backend: str
    remat: Remat
    precision: Precision | None


_TRACING = threading.RLock()
"""One trace at a time in this process: torch keeps what it needs for a trace in places that all threads share."""


class _Held(NamedTuple):
    """A trace that is held: the key of its arguments, its runner, the kinds of the arguments by their paths, and what
    the function read besides them.
    """

    key: Any
    runner: Runner
    kind: Mapping[str, Any]
    surroundings: Surroundings


class TraceCache:
    """Finds the trace for a call's arguments, or makes it.

    `fn`: the plain function; `parameters`: the names of its arguments; `options`: of `ftrain.jit`.
    """

    def __init__(self, fn: Callable[..., Any], parameters: Sequence[str], options: Options) -> None:
        self.options = options
        self.latest: Runner | None = None
        """The runner of the last call."""
        self._fn, self._parameters = fn, list(parameters)
        self._held: list[_Held] = []
        self._surroundings: dict[Runner, Surroundings] = {}
        self._explained = self._dropped = False
        self._finding = threading.RLock()

    def __len__(self) -> int:
        """How many traces are held."""
        return len(self._held)

    def around(self) -> tuple[Any, ...] | None:
        """What must be equal for the latest trace to fit a call, beside the arguments: the modes around it. None, which
        equals nothing, where the function's code would read other values than it did then.
        """
        surroundings = self._surroundings.get(self.latest) if self.latest is not None else None
        return ambient() if surroundings is None or surroundings.unchanged() else None

    def find(self, args: tuple[Any, ...], leaves: list[Any], treedef: Any, sharded: ShardedStep | None) -> Runner:
        """The runner for these arguments; traces if there is none yet.

        `leaves` and `treedef`: of `args`, flat. ValueError for a leaf that was donated or is neither tensor nor
        constant, and for all that a trace refuses.
        """
        paths = argument_paths(args, self._parameters[: len(args)])
        _require_data(paths, leaves)
        with self._finding:
            key = (treedef, tuple(signature_of(leaf) for leaf in leaves), around := ambient())
            for held in self._held:
                if held.key == key and held.surroundings.unchanged():
                    return held.runner
            kind = dict(zip(paths, key[1], strict=False))
            if self._held:
                self._explain(kind, around)
            surroundings = Surroundings(self._fn)
            with _TRACING:
                try:
                    compiled = self._compile(args, paths, leaves, treedef, sharded, around)
                except DrawnMeanwhile:
                    if not surroundings.unchanged():
                        raise
                    with watching_this_thread(numpy_too=surroundings.draws_of_numpy):
                        compiled = self._compile(args, paths, leaves, treedef, sharded, around)
            surroundings.require_undrawn()
            surroundings.add_changed(compiled.traced.changed)
            surroundings.add_captured(captured_tensors(compiled.graph).values())
            self._held.append(held := _Held(key, Runner(compiled), kind, surroundings))
            self._surroundings[held.runner] = surroundings
            self._drop_oldest()
            return held.runner

    def _compile(
        self,
        args: tuple[Any, ...],
        paths: Sequence[str],
        leaves: list[Any],
        treedef: Any,
        sharded: ShardedStep | None,
        around: tuple[Any, ...],
    ) -> Compiled:
        fn, names, options = self._fn, self._parameters[: len(args)], self.options
        if sharded is not None:
            fn = sharded.local_function(fn, paths)
            args = sharded.local_arguments(paths, leaves, treedef)
            names = [*names, COORDINATES]
        return compile_step(
            fn,
            args,
            names,
            donate=options.donate,
            backend=options.backend,
            remat=options.remat,
            precision=options.precision,
            around=around,
            mesh=None if sharded is None else sharded.plan.mesh,
            settle=None if sharded is None else sharded.settle,
            link=Link() if sharded is None else sharded.plan.link,
            hide_communication=sharded is not None and sharded.overlap,
        )

    def _drop_oldest(self) -> None:
        """Keep at most `MOST_TRACES`: each holds a graph and a program."""
        if len(self._held) <= MOST_TRACES:
            return
        del self._surroundings[self._held.pop(0).runner]
        if not self._dropped:
            self._dropped = True
            warnings.warn(
                f"{name_of(self._fn)} was traced for {MOST_TRACES + 1} kinds of arguments; it holds {MOST_TRACES} "
                "traces and drops the oldest from now on. Pack batches to one budget of tokens, and pass numbers that "
                "change as tensors",
                stacklevel=5,
            )

    def _explain(self, now: Mapping[str, Any], around: tuple[Any, ...]) -> None:
        """Warn, the first time only, about what differs from the arguments and the surroundings of the last call."""
        if self._explained or self.latest is None:
            return
        self._explained = True
        held = next((h for h in self._held if h.runner is self.latest), None)
        before = {} if held is None else held.kind
        changes = [
            f"{p}: was {_show(before[p])}, is {_show(now[p])}" for p in now if p in before and before[p] != now[p]
        ]
        changes += [f"{p}: is new" for p in now if p not in before] + [
            f"{p}: is absent" for p in before if p not in now
        ]
        pairs = zip(AMBIENT_NAMES, self.latest.compiled.signature.around, around, strict=True)
        changes += [f"{name} around the call" for name, a, b in pairs if a != b]
        changes += [_changed(change) for change in (() if held is None else held.surroundings.changes())]
        more = f" (and {len(changes) - 4} more)" if len(changes) > 4 else ""
        warnings.warn(
            f"{name_of(self._fn)} is traced again because its arguments changed: {'; '.join(changes[:4])}{more}. Keep "
            "shapes fixed (pack batches to one budget); later retraces are not reported.",
            stacklevel=5,
        )


def _require_data(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if is_half_new(leaf):
            raise ValueError(reason_of(leaf))
        if is_donated(leaf):
            raise ValueError(
                f"leaf {path_of(leaf)!r} was donated to an earlier step, which wrote its new state over it: pass "
                "the state that the step returned, or make the step with donate=None"
            )
    for path, leaf in zip(paths, leaves, strict=True):
        if not is_array(leaf) and not isinstance(leaf, int | float | str | bool | complex | torch.dtype):
            way_out = "convert arrays with torch.as_tensor"
            if dataclasses.is_dataclass(leaf):
                way_out = "decorate its class with @ftrain.struct instead of @dataclass"
            raise ValueError(
                f"leaf {path!r} is {type(leaf).__module__}.{type(leaf).__name__}; a step takes trees of tensors, "
                f"numbers and strings: {way_out}"
            )


def _changed(change: Change) -> str:
    if change.was is MISSING or change.now is MISSING:
        return f"{change.name}, which the step reads, is another"
    return f"{change.name}, which the step reads: was {_short(change.was)}, is {_short(change.now)}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _show(signature: Any) -> str:
    return str(signature) if isinstance(signature, Aval) else repr(signature[1])
