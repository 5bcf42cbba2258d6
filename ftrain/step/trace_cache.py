"""The traces of a jitted function: one for each kind of arguments, at most `MOST_TRACES`."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from ftrain.trace.precision import Precision
from ftrain.trace.surroundings import Surroundings
from ftrain.trace.tracer import Aval, argument_paths, is_array, signature_of

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


class TraceCache:
    """Finds the trace for a call's arguments, or makes it.

    `fn`: the plain function; `parameters`: the names of its arguments; `options`: of `ftrain.jit`.
    """

    def __init__(self, fn: Callable[..., Any], parameters: Sequence[str], options: Options) -> None:
        self.options = options
        self.latest: Runner | None = None
        """The runner of the last call."""
        self._fn, self._parameters = fn, list(parameters)
        self._runners: dict[Any, Runner] = {}
        self._kinds: dict[Runner, Mapping[str, Any]] = {}
        self._explained = self._dropped = False
        self._surroundings: Surroundings | None = None

    def __len__(self) -> int:
        """How many traces are held."""
        return len(self._runners)

    def around(self) -> tuple[Any, ...]:
        """What must be equal for a trace to fit a call, beside the arguments: modes, and values that the function's
        code reads.
        """
        if self._surroundings is None:
            self._surroundings = Surroundings(self._fn)
        return (*ambient(), *self._surroundings.now())

    def find(self, args: tuple[Any, ...], leaves: list[Any], treedef: Any, sharded: ShardedStep | None) -> Runner:
        """The runner for these arguments; traces if there is none yet.

        `leaves` and `treedef`: of `args`, flat. ValueError for a leaf that was donated or is neither tensor nor
        constant, and for all that a trace refuses.
        """
        paths = argument_paths(args, self._parameters[: len(args)])
        _require_data(paths, leaves)
        key = (treedef, tuple(signature_of(leaf) for leaf in leaves), around := self.around())
        found = self._runners.get(key)
        if found is None:
            kind = dict(zip(paths, key[1], strict=False))
            if self._runners:
                self._explain(kind, around)
            found = self._runners[key] = Runner(self._compile(args, paths, leaves, treedef, sharded, around))
            assert self._surroundings is not None
            self._surroundings.watch_attributes(found.compiled.traced.changed)
            self._kinds[found] = kind
            self._drop_oldest()
        return found

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
        if len(self._runners) <= MOST_TRACES:
            return
        del self._kinds[self._runners.pop(next(iter(self._runners)))]
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
        before = self._kinds.get(self.latest, {})
        changes = [
            f"{p}: was {_show(before[p])}, is {_show(now[p])}" for p in now if p in before and before[p] != now[p]
        ]
        changes += [f"{p}: is new" for p in now if p not in before] + [
            f"{p}: is absent" for p in before if p not in now
        ]
        assert self._surroundings is not None
        names = [*(f"{name} around the call" for name in AMBIENT_NAMES), *self._surroundings.names]
        was = self.latest.compiled.signature.around
        if len(was) == len(around):
            pairs = zip(names, was, around, strict=True)
            changes += [f"{name}{_from_to(a, b)}" for name, a, b in pairs if a != b]
        else:
            changes += [
                f"{key} of a {type(m).__name__}: the step changes it" for m, key in self.latest.compiled.traced.changed
            ]
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


def _from_to(was: Any, is_now: Any) -> str:
    simple = all(isinstance(v, tuple) and len(v) == 2 for v in (was, is_now))
    return f", which the step reads: was {was[1]!r}, is {is_now[1]!r}" if simple else ""


def _show(signature: Any) -> str:
    return str(signature) if isinstance(signature, Aval) else repr(signature[1])
