"""Generators that a trace must leave as they are: a step runs its Python once, and what that draws is a constant."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def no_draws_of_python() -> Iterator[None]:
    """Within the block the function is traced. ValueError if it has drawn with `random` or numpy, or has seeded torch:
    under a trace torch's own draws are nodes of the graph, and its generator stays as it was.
    """
    before = _states()
    yield
    names = [name for name, a, b in zip(_NAMES, before, _states(), strict=True) if a != b]
    if names:
        raise ValueError(
            f"the step uses {' and '.join(names)} while it is traced, which happens once: every call would use the "
            "same numbers. Draw with a key (ftrain.uniform, ftrain.normal) or with torch, or pass numbers as tensors; "
            "seed outside of the step"
        )


_NAMES = ("Python's random", "numpy.random", "torch.manual_seed")


def _states() -> tuple[object, object, bytes]:
    of_numpy: Any = np.random.get_state()
    return random.getstate(), (of_numpy[1].tobytes(), *of_numpy[2:]), torch.get_rng_state().numpy().tobytes()
