"""A tree of parameters in two parts: what is trained, and what stays as it is. Each keeps the places of its leaves."""

from collections.abc import Collection, Sequence
from typing import Any

from ftrain.modules.spec import Tree, leaves_with_paths
from ftrain.sharding.paths import Rules


def trained_paths(specs: Tree, *, freeze: Sequence[str] = (), only: Sequence[str] = ()) -> frozenset[str]:
    """The paths of the leaves that are trained: all but those that `freeze` names, or those alone that `only` names.

    Both are globs over paths; one that names a node is about all below it. ValueError for one that matches nothing, for
    both together, and where nothing would be trained.

    >>> sorted(trained_paths({"a": {"w": 0, "b": 1}, "c": 2}, freeze=["a"]))
    ['c']
    """
    if freeze and only:
        raise ValueError("--freeze and --only both say what is trained: give one")
    paths = [path for path, _ in leaves_with_paths(specs)]
    globs = tuple(freeze) or tuple(only)
    rules = Rules(dict.fromkeys(globs, True), of="--freeze" if freeze else "--only", below=True)
    rules.require_used(paths)
    named = {path for path in paths if rules.find(path)}
    found = frozenset(paths) - named if freeze else frozenset(named) if only else frozenset(paths)
    if not found:
        raise ValueError(f"--freeze {' '.join(freeze)}: nothing is left to train")
    return found


def part(tree: Tree, paths: Collection[str], path: str = "") -> Tree:
    """The leaves of a tree at some paths, where they are: lists keep their length, dicts have only what is not empty.

    >>> part({"a": [{"w": 1, "b": 2}, {"w": 3}], "c": 4}, {"a.0.w", "c"})
    {'a': [{'w': 1}, {}], 'c': 4}
    """
    if isinstance(tree, list):
        return [part(child, paths, _join(path, str(i))) for i, child in enumerate(tree)]
    found: dict[str, Any] = {}
    for key, child in tree.items():
        here = _join(path, key)
        if isinstance(child, dict | list):
            below = part(child, paths, here)
            if any(True for _ in leaves_with_paths(below)):
                found[key] = below
        elif here in paths:
            found[key] = child
    return found


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


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
