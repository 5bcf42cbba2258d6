"""Modules without memory: parameters on the meta device, buffers as they are, and calls with a tree in their place."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import functional_call
from torch.nn.modules.module import register_module_parameter_registration_hook

from ftrain.modules.spec import Tree, leaves_with_paths

_LOOKED_AT = 100_000  # elements of a parameter that may have been made of one number


@contextmanager
def without_memory() -> Iterator[None]:
    """Within the block the parameters of new modules are on the meta device, and their buffers where they would be.

    A parameter has memory only until it is registered, which no number was written into yet.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        del module, name
        if parameter is None or parameter.device.type == "meta":
            return None
        made = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        made.begins = _constant(parameter)  # type: ignore[attr-defined]
        return made

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _constant(parameter: Tensor) -> float | None:
    known = parameter.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if not known or not 0 < parameter.numel() <= _LOOKED_AT:
        return None
    low, high = (float(x) for x in parameter.detach().aminmax())
    return low if low == high else None


def begins(parameter: Tensor) -> float | None:
    """The one number that a parameter without memory, of any shape, was made with; None if there is none known."""
    found: float | None = getattr(parameter, "begins", None)
    return found


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that `make()` gives, without memory for its parameters."""
    with without_memory():
        return make()


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dicts from values by dotted path.

    >>> nest({"a.b": 1, "a.c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        place = tree
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value
    return tree


def flatten(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree of dicts by dotted path: the inverse of `nest`."""
    return dict(leaves_with_paths(tree))


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained by name; weights that are tied in the module are one."""
    return {name: parameter for name, parameter in module.named_parameters() if not is_fixed(parameter)}


def fixed(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name that the module does not train: tables of positions, mostly."""
    return {name: parameter for name, parameter in module.named_parameters() if is_fixed(parameter)}


def is_fixed(parameter: nn.Parameter) -> bool:
    """True for a parameter that is not trained (`requires_grad=False`), or has no elements."""
    return not parameter.requires_grad or not parameter.numel()


def call(module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`module(*args, **kwargs)` with `tensors`, by name, in the place of its parameters and buffers.

    Tied weights follow the one that is given. Parameters that the module does not train (`requires_grad` is False) get
    no gradient. The module is left as it was. ValueError, with the line, for a module that converts a layer of its own
    while it runs (`layer.to(dtype)`), and for one that computes parts again in its backward pass
    (`torch.utils.checkpoint`), which would find the module's own numbers there and not those of `tensors`.
    """
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    given = {name: x.detach() if name in frozen else x for name, x in tensors.items()}
    try:
        with disable_saved_tensors_hooks(_RUNS_AGAIN):
            return functional_call(module, given, args, dict(kwargs), tie_weights=True)
    except RuntimeError as error:
        what = next((words for sign, words in _REFUSED.items() if sign in str(error)), None)
        if what is None:
            raise
        frame = next(f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/torch/" not in f.filename)
        raise ValueError(
            f"{type(module).__name__}: at {frame.filename}:{frame.lineno} ({frame.line}) it {what}"
        ) from error


_RUNS_AGAIN = "hooks on what is saved for the backward pass"
_REFUSED = {
    "Couldn't swap": "converts a layer of its own while it runs, which no pure function can: a model of this kind is "
    "not bridged",
    _RUNS_AGAIN: "computes again, or fetches, in its backward pass what it needs there (torch.utils.checkpoint, "
    "saved_tensors_hooks), where a pure function's parameters are no longer the module's: turn this off in the module "
    '(of transformers: gradient_checkpointing_disable()), and give ftrain.jit remat="layer"',
}
"""What a module may not do while it runs, in words, by a part of torch's message."""


@contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """After the block each attribute of the modules within `module` is again what it was before: what a forward pass
    keeps for the next one (the states of a scan, tables made once) is gone, so that every call begins alike.
    """
    before = [(inner, dict(vars(inner)), _hooks(inner)) for inner in module.modules()]
    try:
        yield
    finally:
        for inner, held, hooks in before:
            if any(vars(inner).get(name, module) is not x for name, x in held.items()) or len(held) != len(vars(inner)):
                vars(inner).clear()
                vars(inner).update(held)
            for name, those in hooks.items():
                if held[name].keys() != those.keys():
                    held[name].clear()
                    held[name].update(those)


def _hooks(inner: nn.Module) -> dict[str, dict[int, Any]]:
    """The hooks of a module by their kind: some models add hooks when they first run, and a mark that they have."""
    return {name: dict(x) for name, x in vars(inner).items() if name.startswith("_forward_") and isinstance(x, dict)}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers by name, those that no checkpoint holds and parameters that are not trained too.

    ValueError for one without memory.
    """
    found: dict[str, Tensor] = {**dict(module.named_buffers()), **fixed(module)}
    empty = next((name for name, x in found.items() if x.device.type == "meta"), None)
    if empty is not None:
        raise ValueError(
            f"{type(module).__name__}: its buffer {empty!r} is on the meta device and has no numbers: build the module "
            "outside of torch.device('meta')"
        )
    return {name: x.detach() for name, x in found.items()}


def require_memory(module: nn.Module) -> None:
    """ValueError for a module with parameters on the meta device, where their numbers are needed."""
    for name, parameter in module.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(f"{type(module).__name__}: parameter {name!r} is on the meta device and has no numbers")


def detached(module: nn.Module) -> dict[str, Tensor]:
    """The numbers of the module's parameters by name, which share its memory."""
    require_memory(module)
    return {name: parameter.detach() for name, parameter in parameters(module).items()}
