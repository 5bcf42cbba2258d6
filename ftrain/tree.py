"""Trees of tensors: nested dicts, lists, tuples, NamedTuples and `@struct` dataclasses whose leaves have dotted names.

One optree namespace for the whole trainer. optree sorts the keys of dicts and treats None as a node without leaves;
`torch.utils._pytree` does neither, so the two are never mixed. Tied leaves (one tensor at two places) are two leaves.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, dataclass_transform

import optree
import torch

from ftrain.kernels.documents import Documents
from ftrain.sharding.paths import match, nearest

__all__ = [
    "NAMESPACE", "Tree", "describe", "diff", "first_difference", "flatten", "flatten_until", "leaves", "map",
    "map_many", "map_with_path", "match", "nearest", "paths", "require_same", "static", "struct", "typed_shape",
    "unflatten",
]  # fmt: skip

NAMESPACE = "ftrain"

Tree = Any  # a leaf, or a dict, list, tuple, NamedTuple or struct of trees
T = TypeVar("T")


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """A field of a `@struct` that is not a child but part of the structure: a config, a name, a function.

    Two structs have the same structure only if their static fields are equal, so the value needs `==` and a hash.
    `default`: the field's, if it is not given.

    >>> import torch
    >>> import ftrain
    >>> @ftrain.struct
    ... class Linear:
    ...     w: torch.Tensor
    ...     name: str = ftrain.tree.static(default="linear")
    >>> ftrain.tree.paths(Linear(torch.ones(2)))
    ['w']
    """
    metadata = {"static": True}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def struct(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that is a node of trees; its fields, but for `static()` ones, are children.

    A struct that is rebuilt from its children does not pass through `__init__` or `__post_init__`: while a tree is
    mapped, children may be anything (a name, a bool, a shape). ValueError for a class that is a dataclass already.

    >>> import torch
    >>> import ftrain
    >>> @ftrain.struct
    ... class Linear:
    ...     w: torch.Tensor
    ...     b: torch.Tensor
    >>> ftrain.tree.map(lambda x: x.shape, Linear(torch.ones(2, 3), torch.ones(3)))
    Linear(w=torch.Size([2, 3]), b=torch.Size([3]))
    """
    if "__dataclass_fields__" in vars(cls):
        raise ValueError(f"@ftrain.struct makes a dataclass of {cls.__name__} itself: leave @dataclass out")
    made = dataclasses.dataclass(frozen=True)(cls)
    _register(made)
    return made


def _register(made: Any) -> None:
    """Make a frozen dataclass a node of trees."""
    fields = dataclasses.fields(made)
    children = tuple(f.name for f in fields if not f.metadata.get("static"))
    constants = tuple(f.name for f in fields if f.metadata.get("static"))

    def to_children(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[str, ...]]:
        return tuple(getattr(node, n) for n in children), tuple(getattr(node, n) for n in constants), children

    def from_children(metadata: tuple[Any, ...], values: Iterable[Any]) -> Any:
        node = object.__new__(made)
        for name, value in (*zip(constants, metadata, strict=True), *zip(children, values, strict=True)):
            object.__setattr__(node, name, value)
        return node

    optree.register_pytree_node(
        made,
        to_children,
        from_children,  # type: ignore[arg-type]
        path_entry_type=optree.GetAttrEntry,
        namespace=NAMESPACE,
    )


_register(Documents)  # which lies on a floor that knows no trees


def flatten(tree: Tree) -> tuple[list[Any], optree.PyTreeSpec]:
    """The leaves in order, and the structure that `unflatten` needs to put them back.

    Keys of dicts come in sorted order; None has no leaves.

    >>> from ftrain import tree
    >>> leaves, structure = tree.flatten({"b": 2, "a": [1, None]})
    >>> leaves
    [1, 2]
    >>> tree.unflatten(structure, [10, 20])
    {'b': 20, 'a': [10, None]}
    """
    return optree.tree_flatten(tree, namespace=NAMESPACE)


def flatten_until(tree: Tree, kind: type) -> tuple[list[Any], optree.PyTreeSpec]:
    """As `flatten`, with every object of `kind` taken for a leaf, though it may be a node of trees itself.

    >>> import torch
    >>> import ftrain
    >>> losses = {"text": ftrain.Mean(torch.tensor(6.0), torch.tensor(2.0))}  # a Mean is a tuple of two tensors
    >>> len(ftrain.tree.flatten(losses)[0]), len(ftrain.tree.flatten_until(losses, ftrain.Mean)[0])
    (2, 1)
    """
    return optree.tree_flatten(tree, is_leaf=lambda x: isinstance(x, kind), namespace=NAMESPACE)


def unflatten(treedef: optree.PyTreeSpec, leaves: Iterable[Any]) -> Tree:
    """The tree of structure `treedef` with these leaves, which may be anything. ValueError unless they are as many as
    it has.

    >>> from ftrain import tree
    >>> tree.unflatten(tree.flatten({"w": 1, "b": [2]})[1], ["bias", "weight"])
    {'w': 'weight', 'b': ['bias']}
    """
    return optree.tree_unflatten(treedef, leaves)


def leaves(tree: Tree) -> list[Any]:
    """The leaves in the order of `paths`.

    >>> from ftrain import tree
    >>> tree.leaves({"b": 2, "a": [1, None]})
    [1, 2]
    """
    return flatten(tree)[0]


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`fn(leaf, *leaves of rest)` at every leaf, in a tree shaped as `tree`.

    ValueError that names the place where a tree of `rest` has another structure.

    >>> from ftrain import tree
    >>> tree.map(lambda a, b: a + b, {"w": 1, "b": [2]}, {"w": 10, "b": [20]})
    {'w': 11, 'b': [22]}
    >>> tree.map(lambda a, b: a + b, {"w": 1}, {"w": 10, "b": 20})
    Traceback (most recent call last):
    ValueError: the first tree and tree 2 have different structures: 'b' is only in tree 2
    """
    first, treedef = flatten(tree)
    columns = [first, *(_flatten_as(treedef, other, i) for i, other in enumerate(rest, start=2))]
    return unflatten(treedef, (fn(*row) for row in zip(*columns, strict=True)))


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """As `map`, with the dotted path of the leaf as first argument: `fn(path, leaf, *leaves of rest)`.

    ValueError that names the place where a tree of `rest` has another structure.

    >>> from ftrain import tree
    >>> tree.map_with_path(lambda path, _: path, {"layers": [{"w": 1}]})
    {'layers': [{'w': 'layers.0.w'}]}
    """
    first, treedef = flatten(tree)
    columns = [_paths(treedef), first, *(_flatten_as(treedef, other, i) for i, other in enumerate(rest, start=2))]
    return unflatten(treedef, (fn(*row) for row in zip(*columns, strict=True)))


def map_many(fn: Callable[..., tuple[Any, ...]], outputs: int, tree: Tree, *rest: Tree) -> tuple[Tree, ...]:
    """As `map` for an `fn` that returns a tuple of `outputs` leaves: that many trees, each shaped as `tree`.

    ValueError that names the place where a tree of `rest` has another structure.

    >>> from ftrain import tree
    >>> tree.map_many(lambda x: (x, -x), 2, {"w": 1, "b": 2})
    ({'w': 1, 'b': 2}, {'w': -1, 'b': -2})
    """
    first, treedef = flatten(tree)
    columns = [first, *(_flatten_as(treedef, other, i) for i, other in enumerate(rest, start=2))]
    rows = [fn(*row) for row in zip(*columns, strict=True)]
    return tuple(unflatten(treedef, [row[i] for row in rows]) for i in range(outputs))


def paths(tree: Tree) -> list[str]:
    """The dotted name of every leaf, in order: `params.layers.0.w`. A tree that is one leaf has the name "".

    >>> from ftrain import tree
    >>> tree.paths({"layers": [{"w": 1}, {"w": 2}], "b": 3})
    ['b', 'layers.0.w', 'layers.1.w']
    """
    return _paths(flatten(tree)[1])


def require_same(tree: Tree, other: Tree, *, names: tuple[str, str]) -> None:
    """ValueError unless the two trees have one structure; it calls them `names` and names the first place where they
    differ.

    >>> from ftrain import tree
    >>> tree.require_same({"w": 1}, {"w": [1]}, names=("state", "checkpoint"))
    Traceback (most recent call last):
    ValueError: state and checkpoint have different structures: at 'w': a leaf in state, a list in checkpoint
    """
    _require_same(flatten(tree)[1], flatten(other)[1], names)


def diff(a: Tree, b: Tree, *, limit: int = 20) -> str:
    """How two trees differ, one line per leaf: only in one, or another shape, dtype, device or Python value.

    Values of tensors are not read. "" when nothing differs; of more than `limit` differences the rest is counted.

    >>> import torch
    >>> from ftrain import tree
    >>> print(tree.diff({"w": torch.ones(2), "b": 1}, {"w": torch.ones(3)}))
    b: only in the first, 1
    w: float32[2] cpu against float32[3] cpu
    """
    lines = list(_differences(a, b))
    if not lines:
        place = first_difference(flatten(a)[1], flatten(b)[1])
        return "" if place is None else place
    hidden = len(lines) - limit
    return "\n".join([*lines[:limit], *([f"... and {hidden} more"] if hidden > 0 else [])])


def first_difference(
    a: optree.PyTreeSpec, b: optree.PyTreeSpec, names: tuple[str, str] = ("the first", "the second"), path: str = ""
) -> str | None:
    """Where and how two structures first differ, in words that call them `names`; None when they are equal.

    `a`, `b`: structures, as `flatten` returns them. `path`: of their roots, for the words.
    """
    if a == b:
        return None
    place = repr(path) if path else "the root"
    if a.type is not b.type:
        return f"at {place}: {_kind(a)} in {names[0]}, {_kind(b)} in {names[1]}"
    if a.one_level() != b.one_level():
        names_a, names_b = _child_names(a), _child_names(b)
        lone = [n for n in names_a if n not in names_b] + [n for n in names_b if n not in names_a]
        if not lone:
            return f"at {place}: the static fields of {_kind(a)} differ"
        return f"{_join(path, lone[0])!r} is only in {names[0] if lone[0] in names_a else names[1]}"
    below = zip(_child_names(a), a.children(), b.children(), strict=True)
    return next((d for n, x, y in below if (d := first_difference(x, y, names, _join(path, n))) is not None), None)


def _flatten_as(treedef: optree.PyTreeSpec, other: Tree, position: int) -> list[Any]:
    values, other_def = flatten(other)
    _require_same(treedef, other_def, ("the first tree", f"tree {position}"))
    return values


def _require_same(a: optree.PyTreeSpec, b: optree.PyTreeSpec, names: tuple[str, str]) -> None:
    place = first_difference(a, b, names)
    if place is not None:
        raise ValueError(f"{names[0]} and {names[1]} have different structures: {place}")


def _paths(treedef: optree.PyTreeSpec) -> list[str]:
    return [".".join(_name(entry) for entry in accessor) for accessor in treedef.accessors()]


def _name(entry: optree.PyTreeEntry) -> str:
    if isinstance(entry, optree.NamedTupleEntry | optree.StructSequenceEntry):
        return entry.field
    return str(entry.entry)


def _child_names(spec: optree.PyTreeSpec) -> list[str]:
    one = spec.one_level()
    return [] if one is None else [_name(accessor[0]) for accessor in one.accessors()]


def _kind(spec: optree.PyTreeSpec) -> str:
    return "a leaf" if spec.type is None else "None" if spec.type is type(None) else f"a {spec.type.__name__}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _differences(a: Tree, b: Tree) -> Iterator[str]:
    in_a = dict(zip(paths(a), leaves(a), strict=True))
    in_b = dict(zip(paths(b), leaves(b), strict=True))
    for path, leaf in in_a.items():
        if path not in in_b:
            yield f"{path}: only in the first, {describe(leaf)}"
        elif _differ(leaf, in_b[path]):
            yield f"{path}: {describe(leaf)} against {describe(in_b[path])}"
    yield from (f"{path}: only in the second, {describe(leaf)}" for path, leaf in in_b.items() if path not in in_a)


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return describe(a) != describe(b)
    return type(a) is not type(b) or a != b


def describe(leaf: Any) -> str:
    """A leaf in a few words: `float32[4, 8] cpu` for a tensor, else its repr."""
    if isinstance(leaf, torch.Tensor):
        return f"{typed_shape(leaf)} {leaf.device}"
    return repr(leaf)


def typed_shape(tensor: torch.Tensor) -> str:
    """A tensor's dtype and shape in short, whatever they are: `float32[4, 8]`.

    >>> import torch
    >>> from ftrain.tree import typed_shape
    >>> typed_shape(torch.zeros(4, 8, dtype=torch.bfloat16))
    'bfloat16[4, 8]'
    """
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
