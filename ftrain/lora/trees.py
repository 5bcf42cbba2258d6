"""Trees of deltas beside trees of parameters: what belongs to the leaf `w` lies in the same dict as `w_lora`."""

from collections.abc import Callable, Mapping
from typing import Any

from ftrain.modules.spec import Tree, leaves_with_paths

SUFFIX = "_lora"


def beside(specs: Tree, entries: Mapping[str, Any], path: str = "") -> Tree:
    """A tree with `entries`, by the path of a leaf of `specs`, under the leaf's name and `_lora`. Lists keep their
    length; dicts have only what is not empty.
    """
    if isinstance(specs, list):
        return [beside(child, entries, _join(path, str(i))) or {} for i, child in enumerate(specs)]
    found: dict[str, Any] = {}
    for key, child in specs.items():
        here = _join(path, key)
        if isinstance(child, dict | list):
            below = beside(child, entries, here)
            if any(True for _ in leaves_with_paths(below)):
                found[key] = below
        elif here in entries:
            found[key + SUFFIX] = entries[here]
    return found


def joined(specs: Tree, deltas: Tree) -> Tree:
    """One tree of both; ValueError where they have a name in common."""
    if isinstance(specs, list):
        return [joined(*both) for both in zip(specs, deltas, strict=True)]
    clash = [key for key in deltas if key in specs and not isinstance(specs[key], dict | list)]
    if clash:
        raise ValueError(f"the model has a parameter {clash[0]!r}, which is the name of a delta: call it otherwise")
    own = {key: joined(child, deltas[key]) if key in deltas else child for key, child in specs.items()}
    return {**own, **{key: child for key, child in deltas.items() if key not in specs}}


def leaf(tree: Tree, path: str) -> Any:
    """What lies at a dotted path, a leaf or a tree. ValueError where there is nothing."""
    found = tree
    for name in path.split("."):
        try:
            found = found[int(name)] if isinstance(found, list) else found[name]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"lora: there is no {path!r} in the tree: give that of this model and adapter") from None
    return found


def entry(deltas: Tree, path: str) -> Any:
    """What lies beside the leaf at `path`: a dict with "A", "B". ValueError where there is nothing."""
    return leaf(deltas, path + SUFFIX)


def replaced(tree: Tree, new: Mapping[str, Any]) -> Tree:
    """The tree with others in the place of the leaves at some paths; nothing is copied. ValueError for a path that it
    has not.
    """
    for path in new:
        leaf(tree, path)
    return mapped(tree, lambda path, x: new.get(path, x))


def mapped(
    tree: Tree, function: Callable[[str, Any], Any], is_leaf: Callable[[Any], bool] = lambda _: False, path: str = ""
) -> Tree:
    """The tree with `function(path, leaf)` in the place of each leaf. `is_leaf`: dicts that are leaves themselves."""
    if not isinstance(tree, dict | list) or is_leaf(tree):
        return function(path, tree)
    if isinstance(tree, list):
        return [mapped(child, function, is_leaf, _join(path, str(i))) for i, child in enumerate(tree)]
    return {key: mapped(child, function, is_leaf, _join(path, key)) for key, child in tree.items()}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
