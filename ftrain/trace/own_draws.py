"""Generators that a trace must leave as they are: a step runs its Python once, and what that draws is a constant.

Under a trace torch's own draws are nodes of the graph, which take their numbers from the default generator at each run.
So a generator of the step's own would not be asked, and what the step does to the default one between two draws (seed
it, or put back an earlier state, as `fork_rng` does) would be forgotten: both are refused. To see the latter, every
draw of a trace moves the default generator of the CPU on, and the trace puts it back.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ftrain.graph.source import user_source
from ftrain.graph.torch_private import real_draw, real_state


@contextmanager
def no_draws_of_python() -> Iterator["TorchDraws"]:
    """Within the block the function is traced; yields what is to be shown its ops. ValueError if it has drawn with
    `random` or numpy, has seeded torch or put back a state of its generator: that is as it was after the block.
    """
    before, draws = _states(), TorchDraws()
    try:
        yield draws
        seeded = draws.other_state()
    finally:
        draws.put_back()
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
    """Looks at the ops of a trace that draw with torch."""

    def __init__(self) -> None:
        self._found = torch.get_rng_state()
        real_draw()  # so that seeding with the seed that is in use shows
        self._expected = real_state()

    def look(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """ValueError, with the line, for an op that is given a generator, or draws after the step has changed the state
        of the default one.
        """
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Generator):
                raise ValueError(
                    f"{user_source()}: {func} draws from a torch.Generator, which a traced step cannot hold: its "
                    "numbers would come from torch's default generator. Draw with a key (ftrain.uniform, "
                    "ftrain.normal), leave generator= out, or draw before the step and pass the numbers as tensors"
                )
        if self.other_state():
            raise ValueError(
                f"{user_source()}: before {func} the step has changed the state of torch's generator ({_SEEDING}), "
                "which a traced step would do once: seed outside of the step, or draw with a key (ftrain.uniform, "
                "ftrain.normal)"
            )
        real_draw()
        self._expected = real_state()

    def other_state(self) -> bool:
        """True if the default generator is not where the draws have brought it."""
        return real_state() != self._expected

    def put_back(self) -> None:
        """Give the default generator the state that it was found with."""
        torch.set_rng_state(self._found)


_SEEDING = "torch.manual_seed, set_rng_state or fork_rng"
_NAMES = ("Python's random", "numpy.random", "torch.cuda.manual_seed")


def _states() -> tuple[object, object, object]:
    of_numpy: Any = np.random.get_state()
    cards = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    on_cards = [card.get_state().numpy().tobytes() for card in cards]
    return random.getstate(), (of_numpy[1].tobytes(), *of_numpy[2:]), on_cards
