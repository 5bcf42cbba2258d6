"""Refuses random numbers that a trace would turn into constants.

A step runs its Python code once, so numbers drawn with `random` or numpy are constants of the trace. Torch's own random
ops are nodes of the graph, which draw from the default generator at each run. A generator of the step's own would
not be used, and a change of the default generator's state between two draws (seeding it, or restoring an earlier
state, as `fork_rng` does) would be lost. All of these are refused. To detect a change of state, every random op of a
trace advances the default generator of the CPU; the trace restores it at its end.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ftrain.graph.op_effects import op_draws
from ftrain.graph.source import user_source
from ftrain.graph.torch_private import real_draw, real_state


@contextmanager
def no_draws_of_python() -> Iterator["TorchDraws"]:
    """Check the code within the block, which traces a function; yields the object that must see its ops.

    ValueError at the end of the block if the code has drawn with `random` or numpy, or has changed the state of torch's
    generator. The default generator is restored in any case.
    """
    before, draws = _states(), TorchDraws()
    try:
        yield draws
        seeded = draws.state_was_changed()
    finally:
        draws.restore()
    names = [name for name, a, b in zip(_NAMES, before, _states(), strict=True) if a != b]
    if seeded:
        names.append(_SEEDING)
    if names:
        raise ValueError(
            f"the step uses {' and '.join(names)} while it is traced, which happens once: every call would use the "
            "same numbers. Draw with a key (ftrain.uniform, ftrain.normal) or with torch, or pass numbers as tensors; "
            "seed outside of the step"
        )


class TorchDraws:
    """Checks the random ops of a trace."""

    def __init__(self) -> None:
        self._found = torch.get_rng_state()
        real_draw()  # to detect that the step seeds with the seed in use
        self._expected = real_state()

    def check(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check an op before it runs.

        ValueError, with the user's line, for a random op with a `torch.Generator`, and for one after the step has
        changed the state of the default generator.
        """
        if not (isinstance(func, torch._ops.OpOverload) and op_draws(func, tuple(args), dict(kwargs))):
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Generator):
                raise ValueError(
                    f"{user_source()}: {func} draws from a torch.Generator, which a traced step cannot hold: its "
                    "numbers would come from torch's default generator. Draw with a key (ftrain.uniform, "
                    "ftrain.normal), leave generator= out, or draw before the step and pass the numbers as tensors"
                )
        if self.state_was_changed():
            raise ValueError(
                f"{user_source()}: before {func} the step has changed the state of torch's generator ({_SEEDING}), "
                "which a traced step would do once: seed outside of the step, or draw with a key (ftrain.uniform, "
                "ftrain.normal)"
            )
        real_draw()
        self._expected = real_state()

    def state_was_changed(self) -> bool:
        """True if the step has changed the state of the default generator other than by random ops."""
        return real_state() != self._expected

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
