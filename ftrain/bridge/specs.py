"""Specs of a module's parameters: what their dims mean, and numbers to begin with, read from the module itself."""

from collections.abc import Callable, Mapping, Set

import torch
from torch import Tensor, nn

from ftrain.bridge.skeleton import begins, is_fixed
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


def beginnings(module: nn.Module) -> Callable[[nn.Module], None]:
    """What fills a module within `module`: the rule of the nearest model around it, as transformers does it."""
    rules = dict[int, Callable[[nn.Module], None]]()
    for model in module.modules():
        if hasattr(model, "_init_weights"):
            rules |= {id(inner): model._init_weights for inner in model.modules()}  # type: ignore[misc]
    return lambda inner: rules[id(inner)](inner)


def fix(module: nn.Module) -> None:
    """Give the parameters that a module of transformers without memory does not train the numbers that they have for
    ever: by the module's own `_init_weights`, from the innermost modules outwards. The module is changed.
    """
    without = False
    for inner in module.modules():
        for name, parameter in inner.named_parameters(recurse=False):
            if is_fixed(parameter) and parameter.device.type == "meta":
                made = torch.zeros(parameter.shape, dtype=parameter.dtype)
                inner._parameters[name] = nn.Parameter(made, requires_grad=False)
                without = True
    if without:
        state = torch.get_rng_state()
        with torch.no_grad():
            _begun(module, lambda _: None)
        torch.set_rng_state(state)


def _begun(inner: nn.Module, begin: Callable[[nn.Module], None]) -> None:
    begin = getattr(inner, "_init_weights", begin)
    for child in inner.children():
        _begun(child, begin)
    begin(inner)


def _judged(inner: nn.Module, name: str, parameter: Tensor, begin: Callable[[nn.Module], None] | None) -> Init:
    own = dict(inner.named_parameters(recurse=False))
    if not parameter.numel():
        return zeros()
    if sum(p.numel() for p in own.values()) > _SAMPLED:
        return _by_name(name, parameter)
    numbers = _filled(inner, own, begin)[name].double()
    numbers = numbers[~numbers.isnan()]
    if not numbers.numel():  # nothing fills it but its module's own __init__
        constant = begins(parameter)
        return _by_name(name, parameter) if constant is None else Constant(constant)
    low, high = float(numbers.min()), float(numbers.max())
    if low == high:
        return Constant(low)
    spread = float(numbers.std())
    flat = abs(high + low) < 0.2 * high and abs(high / spread - 3**0.5) < 0.1 and numbers.numel() > 100
    return Uniform(high) if flat else Normal(round(spread, 3) or spread)


def _by_name(name: str, parameter: Tensor) -> Init:
    scales = sum(size > 1 for size in parameter.shape) < 2
    return zeros() if name.endswith("bias") else ones() if scales else Normal(0.02)


def _filled(
    inner: nn.Module, own: Mapping[str, Tensor], begin: Callable[[nn.Module], None] | None
) -> dict[str, Tensor]:
    """The numbers that the module begins with, NaN where it fills nothing in; its own parameters are put back."""
    before = {name: inner._parameters[name] for name in own}
    made = {
        name: nn.Parameter(torch.full(p.shape, torch.nan, dtype=p.dtype), requires_grad=False)
        for name, p in own.items()
    }
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
