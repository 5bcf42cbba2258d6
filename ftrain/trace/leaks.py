"""Nothing of a trace outlives it: a tensor without data that a module, a list or a cache kept would fail much later.

Tensors of a trace are remembered weakly. Those that are alive when it has ended were kept by the step: what modules
cached in their attributes is undone, since the graph does not need it and the next eager call makes it anew; anything
else is refused by name, as is what a module keeps that each call computes anew. Numbers, flags and short containers of
them that a step changes are told to who keeps traces: with other values there is another trace.
"""

import gc
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ftrain.graph.torch_private import FakeTensor
from ftrain.trace.surroundings import is_plain, shown

Made = list["weakref.ref[Tensor]"]

_CONTAINERS = (dict, list, set)
_SWAPPED = ("_parameters", "_buffers")
_REGISTRIES = frozenset(vars(nn.Module()))
"""What torch itself keeps in every module."""
_DEPTH = 4


@contextmanager
def modules_as_found() -> Iterator["Modules"]:
    """Notes the attributes of each module before its first forward within the block."""
    modules = Modules()
    handle = register_module_forward_pre_hook(lambda module, _: modules.note(module))
    try:
        yield modules
    finally:
        handle.remove()


class Modules:
    """The attributes of modules as they were found."""

    def __init__(self) -> None:
        self._found: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}

    def note(self, module: nn.Module) -> None:
        """Remember the attributes of a module, if they are not yet."""
        if module not in self._found:
            attributes = {k: v for k, v in vars(module).items() if not _holds_fake(v, 2)}
            inside = {k: type(v)(v) for k, v in attributes.items() if type(v) in _CONTAINERS and k != "_modules"}
            self._found[module] = attributes, inside

    def require_no_state(self, read: Iterable[Tensor], is_fixed: Callable[[Tensor], bool]) -> None:
        """ValueError for what a module keeps of this call: the next one would not find it. A tensor that was computed
        from the step's arguments (`is_fixed` is False), also in a container; any tensor in the place of one that the
        step has `read`; more items of a list than the next call would compare. Caches of fixed numbers are no state.
        """
        known = {id(tensor) for tensor in read}
        for module, (attributes, inside) in self._found.items():
            before = {**attributes, **inside.get("_buffers", {})}
            now = {**vars(module), **vars(module).get("_buffers", {})}
            for name, value in now.items():
                if name in _REGISTRIES or (name == "_flat_weights" and isinstance(module, nn.RNNBase)):
                    continue  # torch keeps them as the parameters are, also while functional_call swaps these
                old = before.get(name)
                replaced = isinstance(value, FakeTensor) and isinstance(old, Tensor) and id(old) in known
                if replaced or not all(map(is_fixed, _fakes(value, 2))):
                    self.restore()
                    raise ValueError(_state(module, name, "which it reads" if replaced else "computed in this call"))
                if isinstance(value, list) and name in inside and _grows_unseen(value, inside[name]):
                    raise ValueError(_state(module, name, "a list that grows", what="items"))

    def changed(self) -> list[tuple[nn.Module, str]]:
        """The attributes of plain values that the step has changed: a trace with the old values is not for the new."""
        found = []
        for module, (attributes, inside) in self._found.items():
            now = vars(module)
            for name, value in attributes.items():
                before, after = inside.get(name, value), now.get(name)
                if name not in _REGISTRIES and _are_plain(before, after) and shown(before) != shown(after):
                    found.append((module, name))
        return found

    def restore(self) -> None:
        """Give the modules that hold a tensor of a trace the attributes that they were found with."""
        for module, (attributes, inside) in self._found.items():
            now = vars(module)
            if not any(_holds_fake(v, 2) for v in now.values()):
                continue
            for name in [n for n, v in now.items() if n not in attributes and _holds_fake(v, 2)]:
                if name in _SWAPPED:
                    _without_fakes(now[name])
                else:
                    del now[name]
            for name, value in attributes.items():
                now[name] = value
                if name in inside and not _same_items(value, inside[name]):
                    _refill(value, inside[name])


def _without_fakes(tensors: dict[str, Any]) -> None:
    """What was set while `functional_call` had put its own in place: nothing was there before."""
    tensors.update({k: None for k, v in tensors.items() if isinstance(v, FakeTensor)})


def _same_items(container: Any, items: Any) -> bool:
    """True for the same objects; tensors are not compared by value."""
    if isinstance(container, set):
        return set(map(id, container)) == set(map(id, items))
    if isinstance(container, dict):
        return container.keys() == items.keys() and all(container[k] is items[k] for k in items)
    return len(container) == len(items) and all(a is b for a, b in zip(container, items, strict=True))


def _refill(container: Any, items: Any) -> None:
    container.clear()
    container.extend(items) if isinstance(container, list) else container.update(items)


def _are_plain(*values: Any) -> bool:
    return all(map(is_plain, values))


def _grows_unseen(value: list, before: Any) -> bool:
    """True for a list that was changed, whose items are not compared at the next call."""
    return not is_plain(value) and not _holds_fake(value, 2) and not _same_items(value, before)


def _holds_fake(value: Any, depth: int) -> bool:
    return next(_fakes(value, depth), None) is not None


def _fakes(value: Any, depth: int) -> Iterator[Tensor]:
    """The tensors of a trace in a value, or in containers in containers."""
    if isinstance(value, FakeTensor):
        yield value
    elif depth > 0 and type(value) in (dict, list, tuple, set):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _fakes(inner, depth - 1)


def _state(module: nn.Module, name: str, which: str, *, what: str = "a new tensor") -> str:
    return (
        f"the step puts {what} in the place of {name!r} of a {type(module).__name__}, {which}: a jitted step runs its "
        "Python once, so the module would stay as it was. Take it as a part of the state (torch.func.functional_call "
        "gives a module its buffers) and return its new value"
    )


def require_none_left(made: Made, modules: Modules) -> None:
    """ValueError that says who keeps a tensor of a trace that has ended; modules are restored first."""
    if not _alive(made):
        return
    modules.restore()
    if _alive(made):
        gc.collect()
    left = _alive(made)
    while left:
        where = _holder(left[0], [left])
        if where:
            raise ValueError(
                f"the step keeps a tensor of its trace in {where}: while a step is traced tensors have no data, so "
                "nothing may keep them. Return it as a part of the result, or make it before the step and pass it as "
                "an argument"
            )
        del left[0]  # autograd's own, which no Python reaches


def _alive(made: Made) -> list[Tensor]:
    return [t for ref in made if (t := ref()) is not None]


def require_tree_leaf(path: str, leaf: Any) -> None:
    """ValueError for a result that is no tensor and holds one, or that is a number which only a run would know."""
    if type(leaf).__name__ in ("SymInt", "SymFloat", "SymBool"):
        raise ValueError(
            f"result {path!r} is a number that depends on data (.item(), or a size): return the tensor instead"
        )
    if _reaches_fake(leaf, _DEPTH, set()):
        raise ValueError(
            f"result {path!r} is a {type(leaf).__module__}.{type(leaf).__name__}, which is no tree and holds tensors: "
            "return a dict, list, tuple, NamedTuple or ftrain.struct of tensors"
        )


def _reaches_fake(value: Any, depth: int, seen: set[int]) -> bool:
    if isinstance(value, FakeTensor):
        return True
    passed_by = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, str, bytes)
    if depth == 0 or id(value) in seen or isinstance(value, passed_by):
        return False
    seen.add(id(value))
    return any(_reaches_fake(v, depth - 1, seen) for v in gc.get_referents(value))


def _holder(value: Any, ignored: list[Any], depth: int = _DEPTH) -> str:
    """What refers to an object, in words: an attribute, a global, an item of something; empty if nothing does."""
    # no closures here: their cells would be among what refers to the object
    found = ""
    owners = gc.get_referrers(value)
    for owner in owners:
        if owner is ignored or _is_one_of(owner, ignored) or isinstance(owner, types.FrameType | types.GeneratorType):
            continue
        if isinstance(owner, dict) and (named := _owner_of_dict(owner, _key_of(owner, value))):
            return named
        if isinstance(owner, types.CellType):
            found = found or "a variable that it closes over"
        elif isinstance(owner, list | tuple | dict | set):
            inside = _holder(owner, [*ignored, owners], depth - 1) if depth and not found else ""
            found = found or f"a {type(owner).__name__} in {inside or 'an object'}"
        else:
            found = found or f"a {type(owner).__name__}"
    return found


def _is_one_of(owner: Any, ignored: list[Any]) -> bool:
    return any(owner is i for i in ignored)


def _key_of(owner: dict, value: Any) -> Any:
    for key, item in owner.items():
        if item is value:
            return key
    return None


def _owner_of_dict(owner: dict, key: Any) -> str:
    for holder in gc.get_referrers(owner):
        if isinstance(holder, types.ModuleType):
            return f"the global {key!r} of {holder.__name__}"
        if isinstance(holder, types.FunctionType) and holder.__globals__ is owner:
            return f"the global {key!r}"
        if getattr(holder, "__dict__", None) is owner:
            return f"the attribute {key!r} of a {type(holder).__name__}"
        if isinstance(holder, dict) and isinstance(name := _key_of(holder, owner), str):
            return f"{name}[{key!r}]"
    return ""
