"""Global modes of torch that change what a step computes: default dtype, default device, autocast, and so on.

A trace runs under the modes of its call, and they are part of the key of the trace. The program then runs without them,
because the graph holds their effects. Gradient mode and inference mode are set to fixed values for both, because a step
computes its own gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ftrain.graph.torch_private import (
    any_autocast,
    attention_choices,
    functional_transform,
    functions_are_watched,
    modes_are_active,
    without_autocast,
)

_DEVICES = ("cpu", "cuda")
_CPU = torch.device("cpu")


def ambient() -> tuple[Any, ...]:
    """The modes that are part of a trace's key, in the order of `AMBIENT_NAMES`."""
    return (
        torch.get_default_dtype(),
        torch.get_default_device() if functions_are_watched() else _CPU,  # this query is slow
        torch.are_deterministic_algorithms_enabled(),
        attention_choices(),
        _autocast() if any_autocast() else None,
    )


def _autocast() -> tuple[Any, ...]:
    return tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES)


AMBIENT_NAMES = (
    "the default dtype",
    "the default device",
    "use_deterministic_algorithms",
    "the choice of attention kernels",
    "autocast",
)
"""The names of the entries of `ambient()`, for messages."""


def inside_transform_or_trace() -> bool:
    """True inside a transform of `torch.func` or another trace, where a jitted function runs as the plain function."""
    return functional_transform() or modes_are_active()


@contextmanager
def tracing_modes() -> Iterator[None]:
    """Within the block inference mode is off and gradients are on, as a trace needs them."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def program_modes() -> Any:
    """A context in which a program runs: inference mode and autocast are off."""
    if torch.is_inference_mode_enabled() or any_autocast():
        return _plain()
    return nullcontext()


@contextmanager
def _plain() -> Iterator[None]:
    with torch.inference_mode(False), without_autocast():
        yield
