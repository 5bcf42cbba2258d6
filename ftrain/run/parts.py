"""Which of a model's parameters are trained, by globs over their paths."""

from collections.abc import Sequence

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
