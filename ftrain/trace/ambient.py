"""What lies around a call and not in its arguments: modes that change what a step computes.

A trace is made under the modes of its call and they are part of its key; the program then runs with none of them, since
the graph holds what they did. Gradients and inference mode are set alike at both ends: a step takes its own gradients.
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


def ambient() -> tuple:
    """What must be equal for a trace to fit a call, beside the arguments."""
    return (
        torch.get_default_dtype(),
        torch.get_default_device() if functions_are_watched() else _CPU,  # asking takes longer than all else here
        torch.are_deterministic_algorithms_enabled(),
        attention_choices(),
        _autocast() if any_autocast() else None,
    )


def _autocast() -> tuple:
    return tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES)


AMBIENT_NAMES = (
    "the default dtype",
    "the default device",
    "use_deterministic_algorithms",
    "the choice of attention kernels",
    "autocast",
)


def within_another() -> bool:
    """True inside a transform of `torch.func` or another trace: a jitted function is then the plain one."""
    return functional_transform() or modes_are_active()


@contextmanager
def as_a_step() -> Iterator[None]:
    """Within the block the function is traced as a step: outside of inference mode, with gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def as_a_program() -> Any:
    """A context for the run of a program: outside of inference mode and autocast."""
    if torch.is_inference_mode_enabled() or any_autocast():
        return _plain()
    return nullcontext()


@contextmanager
def _plain() -> Iterator[None]:
    with torch.inference_mode(False), without_autocast():
        yield
