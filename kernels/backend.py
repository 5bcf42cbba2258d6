"""Which implementation of a kernel runs: `"reference"` (plain torch, any transform), or the device's best."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._C import _functorch

_reference_only: ContextVar[bool] = ContextVar("ftrain_reference_only", default=False)
_lowering_for: ContextVar[str | None] = ContextVar("ftrain_lowering_for", default=None)


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Within the block every kernel that is left to `"auto"` runs its plain torch reference.

    >>> import torch
    >>> from ftrain.kernels.backend import choose_backend, reference_kernels
    >>> with reference_kernels():
    ...     choose_backend("auto", torch.device("cpu"), {"cpu": "fast"})
    'reference'
    """
    token = _reference_only.set(True)
    try:
        yield
    finally:
        _reference_only.reset(token)


@contextmanager
def lowering_for(kind: str) -> Iterator[None]:
    """Within the block CPU tensors stand for tensors on a `kind` of device ("cuda"): kernels choose what they run
    there.

    It serves to trace a program on a torch that lacks the device. What is chosen can be traced, but not run.
    """
    token = _lowering_for.set(kind)
    try:
        yield
    finally:
        _lowering_for.reset(token)


def device_type(at: Tensor | torch.device) -> str:
    """The type of the device that a tensor (of any shape) is on, e.g. `"cuda"`; under `lowering_for`, of the one that
    it stands for. A kernel asks this wherever the answer decides which ops a trace gets.
    """
    kind = at.type if isinstance(at, torch.device) else at.device.type
    return (_lowering_for.get() or kind) if kind == "cpu" else kind


def inside_higher_transform() -> bool:
    """True under `vmap`, `jvp` or a nested `grad` of `torch.func`: there only the plain torch reference composes."""
    if _reference_only.get():
        return True
    stack = _functorch.get_interpreter_stack()
    if not stack:
        return False
    return len(stack) > 1 or stack[-1].key() != _functorch.TransformType.Grad


def choose_backend(backend: str, device: torch.device, available: dict[str, str]) -> str:
    """The name of the implementation to run, resolved from a kernel's `backend` argument.

    `available` maps a device type to its best implementation, e.g. `{"cpu": "cpu", "cuda": "flash"}`. `"auto"` is that
    of `device`, and `"reference"` on other devices, under `vmap`, `jvp` and nested `grad`. Any other name must be
    "reference" or one of `available`; else ValueError lists the names.

    >>> import torch
    >>> from ftrain.kernels.backend import choose_backend
    >>> choose_backend("auto", torch.device("cpu"), {"cpu": "fast", "cuda": "flash"})
    'fast'
    """
    if backend == "auto":
        return "reference" if inside_higher_transform() else available.get(device_type(device), "reference")
    known = {"reference", *available.values()}
    if backend not in known:
        raise ValueError(f"backend={backend!r} is not one of {sorted(known | {'auto'})}")
    return backend
