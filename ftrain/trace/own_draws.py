"""Refuses random numbers that a trace would turn into constants.

A step runs its Python code once, so numbers drawn with `random` or numpy are constants of the trace. Torch's own random
ops are nodes of the graph, which draw from the default generator at each run. A generator of the step's own would
not be used, and a change of the default generator's state between two draws (seeding it, or restoring an earlier
state, as `fork_rng` does) would be lost. All of these are refused. To detect a change of state, every random op of a
trace advances the default generator of the CPU; the trace restores it at its end.

Other threads may draw during a trace. Where a state has changed and other threads are alive, the step is traced again
while all calls of this thread are watched.
"""

import random
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch

from ftrain.graph.op_effects import op_draws
from ftrain.graph.source import SourceLine, user_source
from ftrain.graph.torch_private import real_draw, real_state
from ftrain.trace.refusals import Untraceable


class DrawnMeanwhile(Untraceable):
    """A generator was drawn from or seeded during a trace, by the step or by another thread: it is not known which."""


@contextmanager
def no_draws_of_python() -> Iterator["TorchDraws"]:
    """Check the code within the block, which traces a function; yields the object that must see its ops.

    ValueError at the end of the block if the code has drawn with `random` or numpy, or has changed the state of torch's
    generator; it is a `DrawnMeanwhile` where other threads are alive. The default generator is restored in any case.
    Within `watching_this_thread` only what this thread does counts.
    """
    before, watching, where = _states(), _watching.get(), ""
    if watching is not None:
        with _calls_of_this_thread() as found:
            yield TorchDraws(watch=False)
        names, where = list(found), "".join(f"{line}: " for line in [*found.values()][:1])
        if watching.numpy_too and before[1] != _states()[1]:
            names.append(_NAMES[1])
    else:
        draws = TorchDraws()
        try:
            yield draws
            seeded = draws.state_was_changed()
        finally:
            draws.restore()
        names = [name for name, a, b in zip(_NAMES, before, _states(), strict=True) if a != b]
        if seeded:
            names.append(_SEEDING)
    if names:
        raise _refusal()(
            f"{where}the step uses {' and '.join(names)} while it is traced, which happens once: every call would use "
            "the same numbers. Draw with a key (ftrain.uniform, ftrain.normal) or with torch, or pass numbers as "
            "tensors; seed outside of the step"
        )


class _Watching(NamedTuple):
    numpy_too: bool


@contextmanager
def watching_this_thread(*, numpy_too: bool) -> Iterator[None]:
    """Within the block traces ask which thread draws, which makes them several times slower.

    `numpy_too`: a change of the state of numpy's generator counts, because the function's code names its functions,
    whose calls cannot be watched.
    """
    token = _watching.set(_Watching(numpy_too))
    try:
        yield
    finally:
        _watching.reset(token)


_watching: ContextVar[_Watching | None] = ContextVar("ftrain_watching_this_thread", default=None)


def _refusal() -> type[Untraceable]:
    return DrawnMeanwhile if threading.active_count() > 1 and _watching.get() is None else Untraceable


@contextmanager
def _calls_of_this_thread() -> Iterator[dict[str, SourceLine | None]]:
    """Within the block, collects which global generators this thread draws from or seeds, and where it does first."""
    found: dict[str, SourceLine | None] = {}

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and (name := _drawn_by(called)):
            found.setdefault(name, user_source())

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _drawn_by(called: Any) -> str | None:
    """The global generator, Python's or torch's, that a call in C draws from or seeds."""
    owner = getattr(called, "__self__", None)
    if owner is OF_PYTHON and called.__name__ != "getstate":
        return _NAMES[0]
    return _SEEDING if isinstance(owner, torch.Generator) and called.__name__ in _SEEDS else None


OF_PYTHON: random.Random = random.random.__self__  # type: ignore[attr-defined]
"""Python's global generator."""
OF_NUMPY: np.random.RandomState = np.random.random.__self__  # type: ignore[attr-defined]
"""Numpy's global generator."""
_SEEDS = {"manual_seed", "seed", "set_state"}


class TorchDraws:
    """Checks the random ops of a trace."""

    def __init__(self, *, watch: bool = True) -> None:
        """`watch`: whether to look at the state of the default generator."""
        self._watch = watch
        self._found = torch.get_rng_state()
        self._draw()  # to detect that the step seeds with the seed in use

    def check(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check an op before it runs.

        Untraceable, a ValueError, with the user's line, for a random op with a `torch.Generator`, and for one after the
        step has changed the state of the default generator.
        """
        if not (isinstance(func, torch._ops.OpOverload) and op_draws(func, tuple(args), dict(kwargs))):
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Generator):
                raise Untraceable(
                    f"{user_source()}: {func} draws from a torch.Generator, which a traced step cannot hold: its "
                    "numbers would come from torch's default generator. Draw with a key (ftrain.uniform, "
                    "ftrain.normal), leave generator= out, or draw before the step and pass the numbers as tensors"
                )
        if self.state_was_changed():
            raise _refusal()(
                f"{user_source()}: before {func} the step has changed the state of torch's generator ({_SEEDING}), "
                "which a traced step would do once: seed outside of the step, or draw with a key (ftrain.uniform, "
                "ftrain.normal)"
            )
        self._draw()

    def _draw(self) -> None:
        if self._watch:
            real_draw()
            self._expected = real_state()

    def state_was_changed(self) -> bool:
        """True if the step has changed the state of the default generator other than by random ops."""
        return self._watch and real_state() != self._expected

    def restore(self) -> None:
        """Restore the state that the default generator had before the trace."""
        torch.set_rng_state(self._found)


_SEEDING = "torch.manual_seed, set_rng_state or fork_rng"
_NAMES = ("Python's random", "numpy.random", "torch.cuda.manual_seed")


def _states() -> tuple[object, object, object]:
    of_numpy: Any = np.random.get_state()
    cards = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    on_cards = [card.get_state().numpy().tobytes() for card in cards]
    return random.getstate(), (of_numpy[1].tobytes(), *of_numpy[2:]), on_cards
