"""Trees of deltas beside trees of parameters: what belongs to the leaf `w` lies in the same dict as `w_lora`; and trees
in two parts, each with its leaves at their places.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ftrain.modules.spec import Tree, leaves_with_paths

SUFFIX = "_lora"


def part(tree: Tree, paths: Collection[str]) -> Tree:
    """The leaves of a tree at some paths, where they are: lists keep their length, dicts have only what is not empty.

    >>> part({"a": [{"w": 1, "b": 2}, {"w": 3}], "c": 4}, {"a.0.w", "c"})
    {'a': [{'w': 1}, {}], 'c': 4}
    """
    return _part(tree, lambda path, key, leaf: {key: leaf} if path in paths else {}, "")


def beside(specs: Tree, entries: Mapping[str, Any]) -> Tree:
    """A tree with `entries`, by the path of a leaf of `specs`, under the leaf's name and `_lora`. Lists keep their
    length; dicts have only what is not empty.
    """
    return _part(specs, lambda path, key, _: {key + SUFFIX: entries[path]} if path in entries else {}, "")


def union(a: Tree, b: Tree) -> Tree:
    """The tree whose parts are `a` and `b`. ValueError where both have a leaf.

    >>> union({"a": [{"w": 1}, {}]}, {"a": [{"b": 2}, {"w": 3}], "c": 4})
    {'a': [{'w': 1, 'b': 2}, {'w': 3}], 'c': 4}
    """
    if isinstance(a, list) and isinstance(b, list):
        return [union(*both) for both in zip(a, b, strict=True)]
    if not (isinstance(a, dict) and isinstance(b, dict)):
        raise ValueError("two parts of a tree have the same leaf")
    own = {key: union(child, b[key]) if key in b else child for key, child in a.items()}
    return {**own, **{key: child for key, child in b.items() if key not in a}}


def joined(specs: Tree, deltas: Tree) -> Tree:
    """One tree of both; ValueError where they have a name in common."""
    try:
        return union(specs, deltas)
    except ValueError as error:
        known = {path for path, _ in leaves_with_paths(specs)}
        parts = [path.split(".") for path, _ in leaves_with_paths(deltas)]
        nodes = (".".join(names[:n]) for names in parts for n in range(1, len(names) + 1))
        clash = next((path for path in nodes if path in known), None)
        raise ValueError(
            f"the model has a parameter {clash!r}, which is the name of a delta: call it otherwise"
        ) from error


def _part(tree: Tree, take: Callable[[str, str, Any], dict[str, Any]], path: str) -> Tree:
    """What `take(path, key, leaf)` gives of the leaves, in the lists of a tree and those dicts that are not empty."""
    if isinstance(tree, list):
        return [_part(child, take, _join(path, str(i))) for i, child in enumerate(tree)]
    found: dict[str, Any] = {}
    for key, child in tree.items():
        here = _join(path, key)
        if isinstance(child, dict | list):
            below = _part(child, take, here)
            if any(True for _ in leaves_with_paths(below)):
                found[key] = below
        else:
            found |= take(here, key, child)
    return found


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
