"""Specs of a module's parameters: what their dims mean, and numbers to begin with, read from the module itself."""

from collections.abc import Callable, Mapping, Set

import torch
from torch import Tensor, nn

from ftrain.modules.spec import Constant, Init, Normal, ParamSpec, Uniform, ones, zeros

_SAMPLED = 4_000_000  # elements of a parameter that is filled once to see what its module begins with


def specs_of(
    parameters: Mapping[str, Tensor],
    *,
    vocab: Set[str] = frozenset(),
    experts: Set[str] = frozenset(),
    inits: Mapping[str, Init] | None = None,
) -> dict[str, ParamSpec]:
    """A spec for each parameter, by name. `vocab`: tables and heads with a row for each token. `experts`: those with an
    entry for each expert, which the primitive of experts reads. `inits`: where known.

    Dims of which nothing is known are "any": a plan divides the first that suits.
    """
    found = {}
    for name, parameter in parameters.items():
        init = (inits or {}).get(name) or Normal(0.02)
        found[name] = ParamSpec(tuple(parameter.shape), _axes(name, parameter, vocab, experts), init, parameter.dtype)
    return found


def _axes(name: str, parameter: Tensor, vocab: Set[str], experts: Set[str]) -> tuple[str | None, ...]:
    dims = parameter.dim()
    if dims and name in vocab:
        return ("vocab", *("embed",) * (dims - 1))
    if dims and name in experts:
        return ("expert", *("any",) * (dims - 1))
    return ("any",) * dims


def inits_of(module: nn.Module, begin: Callable[[nn.Module], None] | None = None) -> dict[str, Init]:
    """What each parameter begins with, by name: found out by filling one of each kind with the module's own numbers.

    `begin(module)`: fills the parameters that a module holds itself; None: its `reset_parameters`, if it has any.
    A parameter of more than 4 million elements is judged by its name alone. The module may be without memory.
    """
    seen: dict[tuple[object, ...], Init] = {}
    found: dict[str, Init] = {}
    for path, inner in module.named_modules():
        for name, parameter in inner.named_parameters(recurse=False):
            key = (type(inner), name, tuple(parameter.shape))
            if key not in seen:
                seen[key] = _judged(inner, name, parameter, begin)
            found[f"{path}.{name}" if path else name] = seen[key]
    return found


def _judged(inner: nn.Module, name: str, parameter: Tensor, begin: Callable[[nn.Module], None] | None) -> Init:
    own = dict(inner.named_parameters(recurse=False))
    if sum(p.numel() for p in own.values()) > _SAMPLED:
        return zeros() if name.endswith("bias") else ones() if parameter.dim() < 2 else Normal(0.02)
    numbers = _filled(inner, own, begin)[name].double()
    low, high = float(numbers.min()), float(numbers.max())
    if low == high:
        return Constant(low)
    spread = float(numbers.std())
    flat = abs(high + low) < 0.2 * high and abs(high / spread - 3**0.5) < 0.1 and numbers.numel() > 100
    return Uniform(high) if flat else Normal(round(spread, 3) or spread)


def _filled(
    inner: nn.Module, own: Mapping[str, Tensor], begin: Callable[[nn.Module], None] | None
) -> dict[str, Tensor]:
    """The numbers that the module begins with; its own parameters are put back."""
    before = {name: inner._parameters[name] for name in own}
    made = {name: nn.Parameter(torch.zeros(p.shape, dtype=p.dtype), requires_grad=False) for name, p in own.items()}
    state = torch.get_rng_state()
    try:
        inner._parameters.update(made)
        torch.manual_seed(0)
        if begin is not None:
            begin(inner)
        elif hasattr(inner, "reset_parameters"):
            inner.reset_parameters()  # type: ignore[operator]
        return {name: p.detach() for name, p in made.items()}
    finally:
        inner._parameters.update(before)
        torch.set_rng_state(state)
