"""Finds tensors of a trace that outlive it, and state that a step keeps in modules.

Tensors of a trace are fake: they have no data, so one that a module, a list or a cache keeps would fail much later. The
trace holds weak references to its tensors. A tensor that still exists after the trace was kept by the step. If a module
cached it in an attribute, the attribute is restored, because the graph does not need it and the next eager call
computes it again. Any other owner is refused by name, as is a module that keeps a result of this call (a state).
Attributes with plain values (numbers, flags, short containers of them) that a step changes become part of the key of
its traces: other values need another trace.
"""

import gc
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ftrain.graph.torch_private import FakeTensor
from ftrain.kernels.stand_in import StandIn
from ftrain.trace.plain_values import comparable, form_of, is_plain

Made = list["weakref.ref[Tensor]"]

_CONTAINERS = (dict, list, set)
_SWAPPED = ("_parameters", "_buffers")
_REGISTRIES = frozenset(vars(nn.Module()))
"""The attributes that torch itself keeps in every module."""
_DEPTH = 4


@contextmanager
def recording_modules() -> Iterator["Modules"]:
    """Within the block, records the attributes of each module before its first forward; yields the record."""
    modules, own_thread = Modules(), threading.get_ident()

    def note(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == own_thread:
            modules.note(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield modules
    finally:
        handle.remove()


class Modules:
    """The attributes that modules had before the trace."""

    def __init__(self) -> None:
        self._found: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}

    def note(self, module: nn.Module) -> None:
        """Record the attributes of a module, unless they are recorded already."""
        if module not in self._found:
            attributes = {k: v for k, v in vars(module).items() if not _holds_fake(v, 2)}
            inside = {k: type(v)(v) for k, v in attributes.items() if type(v) in _CONTAINERS and k != "_modules"}
            self._found[module] = attributes, inside

    def require_no_state(self, read: Iterable[Tensor], is_fixed: Callable[[Tensor], bool]) -> None:
        """ValueError if a module keeps a result of this call, because the next call of the program would not update it.

        Refused are, in an attribute: a tensor computed from the step's arguments (`is_fixed` is False), also in a
        container; a new tensor in place of a captured one (`read`); and a list that grows and is too long to be part of
        a trace's key. A cache of values that are the same at every call is not refused. Modules are restored first.
        """
        known = {id(tensor) for tensor in read}
        for module, (attributes, inside) in self._found.items():
            before = {**attributes, **inside.get("_buffers", {})}
            now = {**vars(module), **vars(module).get("_buffers", {})}
            for name, value in now.items():
                if name in _REGISTRIES or (name == "_flat_weights" and isinstance(module, nn.RNNBase)):
                    continue  # torch keeps these consistent with the parameters, also within functional_call
                old = before.get(name)
                replaced = isinstance(value, FakeTensor) and isinstance(old, Tensor) and id(old) in known
                if replaced or not all(map(is_fixed, _fakes(value, 2))):
                    self.restore()
                    raise ValueError(_state(module, name, "which it reads" if replaced else "computed in this call"))
                if isinstance(value, list) and name in inside and _grows_unseen(value, inside[name]):
                    raise ValueError(_state(module, name, "a list that grows", what="items"))

    def changed(self) -> list[tuple[nn.Module, str, Any]]:
        """The attributes with plain values that the step has changed or added: module, name, and the value before (None
        for one that was added).
        """
        found = []
        for module, (attributes, inside) in self._found.items():
            now = vars(module)
            for name, value in attributes.items():
                before, after = inside.get(name, value), now.get(name)
                if name not in _REGISTRIES and _are_plain(before, after) and comparable(before) != comparable(after):
                    found.append((module, name, before))
            found += [(module, name, None) for name in _added(now, attributes)]
        return found

    def changed_beside_caches(self) -> list[tuple[nn.Module, str]]:
        """Those of `changed` that `restore` takes back, since their modules hold tensors of the trace as well."""
        holders = {module for module in self._found if any(_holds_fake(v, 2) for v in vars(module).values())}
        return [(m, name) for m, name, _ in self.changed() if m in holders and form_of(vars(m).get(name)) is not None]

    def restore(self) -> None:
        """Restore the recorded attributes of each module that holds a tensor of a trace."""
        for module, (attributes, inside) in self._found.items():
            now = vars(module)
            if not any(_holds_fake(v, 2) for v in now.values()):
                continue
            for name in [n for n, v in now.items() if n not in attributes and _holds_fake(v, 2)]:
                if name in _SWAPPED:
                    _without_fakes(now[name])
                else:
                    del now[name]
            for name in _added(now, attributes):
                del now[name]
            for name, value in attributes.items():
                now[name] = value
                if name in inside and not _same_items(value, inside[name]):
                    _refill(value, inside[name])


def _added(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """The names of a module's attributes with plain values, and no tensor of a trace, that it did not have before."""
    new = {name: value for name, value in now.items() if name not in before and name not in _REGISTRIES}
    return [name for name, value in new.items() if is_plain(value) and not _holds_fake(value, 2)]


def _without_fakes(tensors: dict[str, Any]) -> None:
    """Set tensors of a trace to None, which were assigned while `functional_call` had swapped the parameters."""
    tensors.update({k: None for k, v in tensors.items() if isinstance(v, FakeTensor | StandIn)})


def _same_items(container: Any, items: Any) -> bool:
    """True if both hold the same objects; tensors are not compared by value."""
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


def _grows_unseen(value: list[Any], before: Any) -> bool:
    """True for a changed list that is not plain, so that the next call does not compare its items."""
    return not is_plain(value) and not _holds_fake(value, 2) and not _same_items(value, before)


def _holds_fake(value: Any, depth: int) -> bool:
    return next(_fakes(value, depth), None) is not None


def _fakes(value: Any, depth: int) -> Iterator[Any]:
    """The tensors of a trace, and weights made of them, in a value and in its nested containers, to this depth."""
    if isinstance(value, FakeTensor | StandIn):
        yield value
    elif depth > 0 and type(value) in (dict, list, tuple, set):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _fakes(inner, depth - 1)


def _state(module: nn.Module, name: str, which: str, *, what: str = "a new tensor") -> str:
    return (
        f"the step puts {what} in the place of {name!r} of a {type(module).__name__}, {which}: a jitted step runs its "
        "Python once, so the module would not change at later calls. Pass it as a part of the state "
        "(torch.func.functional_call gives a module its buffers) and return its new value"
    )


def require_none_left(made: Made, modules: Modules) -> None:
    """ValueError if a tensor of an ended trace still has an owner, which the message names.

    `made`: weak references to the tensors of the trace. `modules` are restored first.
    """
    if not _remaining(made):
        return
    modules.restore()
    for generation in (1, 2):  # young garbage first: to look at all objects of a process takes a part of a second
        if _remaining(made):
            gc.collect(generation)
    left = _remaining(made)
    while left:
        where = _holder(left[0], [left])
        if where:
            raise ValueError(
                f"the step keeps a tensor of its trace in {where}: while a step is traced tensors have no data, so "
                "nothing may keep them. Return it as a part of the result, or make it before the step and pass it as "
                "an argument"
            )
        del left[0]  # held by autograd, out of reach for Python code


def _remaining(made: Made) -> list[Tensor]:
    return [t for ref in made if (t := ref()) is not None]


def require_tree_leaf(path: str, leaf: Any) -> None:
    """ValueError for a leaf of the result that is not a tensor but holds one, or is a number that depends on data.

    `path`: the leaf's, for the message.
    """
    if isinstance(leaf, str) and any(name in leaf for name in ("FakeTensor(", "FunctionalTensor(")):
        raise ValueError(
            f"result {path!r} is a text that shows a tensor, which has no numbers while a step is traced: return the "
            "tensor as a metric and format it after the call"
        )
    if type(leaf).__name__ in ("SymInt", "SymFloat", "SymBool"):
        raise ValueError(
            f"result {path!r} is a number that depends on data (.item(), or a size): return the tensor instead"
        )
    if _reaches_fake(leaf, _DEPTH, set()):
        raise ValueError(
            f"result {path!r} is a {type(leaf).__module__}.{type(leaf).__name__}, which is not a tree but holds "
            "tensors: return a dict, list, tuple, NamedTuple or ftrain.struct of tensors"
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
    """The owner of an object in words: an attribute, a global, an item of a container; empty if there is none."""
    # no closures in this function: their cells would refer to the object too
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


def _key_of(owner: dict[Any, Any], value: Any) -> Any:
    for key, item in owner.items():
        if item is value:
            return key
    return None


def _owner_of_dict(owner: dict[Any, Any], key: Any) -> str:
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
