"""Generators of random numbers that a step holds: numbers drawn from them in a trace would be constants."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
"""Classes of generators whose draws a trace does not see. Torch's are refused where an op takes one."""


class HeldGenerators:
    """Generators and their names, with the states that they have when this object is made."""

    def __init__(self, generators: Iterable[tuple[Any, str]]) -> None:
        self._held = [(generator, name, _state(generator)) for generator, name in generators]

    def require_undrawn(self) -> None:
        """ValueError that names a generator which was drawn from since. All of them get back their states."""
        drawn = [held for held in self._held if not _same_state(_state(held[0]), held[2])]
        for generator, _, state in drawn:
            _restore(generator, state)
        for generator, name, _ in drawn[:1]:
            kind = type(generator)
            raise ValueError(
                f"the step draws from {name!r}, a {kind.__module__.partition('.')[0]} {kind.__name__}, while it is "
                "traced, which happens once: every call would use the same numbers. Draw with a key (ftrain.uniform, "
                "ftrain.normal) or with torch, or draw before the step and pass the numbers as tensors"
            )


def _state(generator: Any) -> Any:
    """The state of a generator of random numbers. One that has none gets a state of its own at each look."""
    if isinstance(generator, random.SystemRandom):
        return object()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return (generator if isinstance(generator, np.random.BitGenerator) else generator.bit_generator).state


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, random.SystemRandom):
        return
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        (generator if isinstance(generator, np.random.BitGenerator) else generator.bit_generator).state = state


def _same_state(a: Any, b: Any) -> bool:
    return a == b if isinstance(a, tuple) else repr(_listed(a)) == repr(_listed(b))


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
