"""A random step as a small data structure: it can be printed as Python, made smaller, and made again from its seed.

Everything that is computed is a line of source with holes for what it reads, so that a line can be taken out and its
readers given something else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

DEFAULT_ROWS = (8,)


class Pair(NamedTuple):
    """A node of random state trees."""

    left: Any
    right: Any


@dataclass(frozen=True)
class Line:
    """One statement. `text` has `{0}`, `{1}`, ... for `ins`, expressions that it reads; `out`: the variable that it
    makes, None for a statement that changes something. `feature`: what kind of op it is, for the counts.
    """

    text: str
    ins: tuple[str, ...]
    out: str | None
    feature: str

    def source(self) -> str:
        """The statement."""
        text = self.text.format(*self.ins)
        return text if self.out is None else f"{self.out} = {text}"


@dataclass(frozen=True)
class Loss:
    """A function that is differentiated: `lines` over its arguments, then `result`, with `aux` beside it.

    `subtrees`: expressions of the step that are its first arguments, `p0`, `p1`, ...; by these it is differentiated.
    The last argument is the batch. `micro_batches`: above 1 the batch is accumulated over.
    """

    name: str
    subtrees: tuple[str, ...]
    lines: tuple[Line, ...]
    result: Line
    aux: tuple[str, ...] = ()
    micro_batches: int = 1

    @property
    def gradient(self) -> str:
        """The variable that holds the gradients: of one subtree, or a tuple."""
        return f"g{self.name}"

    @property
    def value(self) -> str:
        """The variable that holds the loss."""
        return f"value{self.name}"

    def of_gradient(self, number: int) -> str:
        """The expression of the gradient of one subtree."""
        return self.gradient if len(self.subtrees) == 1 else f"{self.gradient}[{number}]"


@dataclass(frozen=True)
class Options:
    """How the step is jitted and called, as source; the defaults are those of `ftrain.jit`.

    `rows`: of the batch of each call; the state is that which the call before returned.
    """

    donate: bool = False
    remat: str | None = None
    backend: str = "aten"
    precision: str | None = None
    mesh: str | None = None
    layout: str = "Layout()"
    overlap: bool = True
    rows: tuple[int, ...] = DEFAULT_ROWS


@dataclass(frozen=True)
class Program:
    """A step, its arguments and its options.

    `leaves`: variables of `make_state`, in order; `tree`: a nesting of dicts, lists, tuples and `Pair`s of their names.
    `specs`: names of leaves that a plan knows. `batch`: key to source, over `rows`. `captured`: constants of the
    module. `updates`: expression of a leaf of the state to that of its new value; a leaf without one stays. `metrics`:
    by name.
    """

    seed: int
    leaves: tuple[tuple[str, str], ...]
    tree: Any
    batch: tuple[tuple[str, str], ...]
    captured: tuple[tuple[str, str], ...] = ()
    specs: tuple[str, ...] = ()
    before: tuple[Line, ...] = ()
    losses: tuple[Loss, ...] = ()
    after: tuple[Line, ...] = ()
    updates: tuple[tuple[str, str], ...] = ()
    metrics: tuple[tuple[str, str], ...] = ()
    options: Options = field(default_factory=Options)

    @property
    def file(self) -> str:
        """The name of the file that errors point at."""
        return f"fuzz_{self.seed}.py"

    def lines(self) -> Iterator[Line]:
        """All lines of the step."""
        yield from self.before
        for loss in self.losses:
            yield from loss.lines
            yield loss.result
        yield from self.after

    def features(self) -> set[str]:
        """What the program is made of, in words."""
        chosen = self.options
        found = {f"op: {line.feature}" for line in self.lines()}
        found |= {f"loss: {loss.result.feature}" for loss in self.losses}
        given = {
            "donate": chosen.donate,
            f"remat {(chosen.remat or '').split('=')[0].split('(')[-1]}": chosen.remat,
            f"backend {chosen.backend}": chosen.backend != "aten",
            "precision": chosen.precision,
            f"mesh {(chosen.mesh or '').partition('(')[2].partition(', kind')[0]}": chosen.mesh,
            "accumulate": any(loss.micro_batches > 1 for loss in self.losses),
            "several calls": len(chosen.rows) > 1,
            "several shapes": len(set(chosen.rows)) > 1,
            "several losses": len(self.losses) > 1,
            "aux": any(loss.aux for loss in self.losses),
            "tied leaves": _has_tied(self.tree),
            "captured tensors": self.captured,
        }
        return found | {f"option: {name}" for name, value in given.items() if value}


def leaf_paths(tree: Any, root: str) -> dict[str, str]:
    """For each leaf of a nesting the expression that reads it, from the expression of the root, to its name."""
    if isinstance(tree, str):
        return {root: tree}
    if isinstance(tree, dict):
        children = {f'{root}["{key}"]': child for key, child in tree.items()}
    elif isinstance(tree, Pair):
        children = {f"{root}.{name}": child for name, child in zip(tree._fields, tree, strict=True)}
    else:
        children = {f"{root}[{i}]": child for i, child in enumerate(tree)}
    return {path: name for at, child in children.items() for path, name in leaf_paths(child, at).items()}


def tree_source(tree: Any, root: str, leaf: Callable[[str, str], str]) -> str:
    """The nesting as source, with `leaf(path, name)` at each leaf."""
    if isinstance(tree, str):
        return leaf(root, tree)
    if isinstance(tree, dict):
        parts = {key: tree_source(child, f'{root}["{key}"]', leaf) for key, child in tree.items()}
        return "{" + ", ".join(f'"{key}": {part}' for key, part in parts.items()) + "}"
    if isinstance(tree, Pair):
        fields = (tree_source(child, f"{root}.{name}", leaf) for name, child in zip(tree._fields, tree, strict=True))
        return f"Pair({', '.join(fields)})"
    items = [tree_source(child, f"{root}[{i}]", leaf) for i, child in enumerate(tree)]
    if isinstance(tree, list):
        return f"[{', '.join(items)}]"
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def without_leaf(tree: Any, name: str) -> Any:
    """The nesting without the leaves of that name; None where nothing is left."""
    if isinstance(tree, str):
        return None if tree == name else tree
    if isinstance(tree, dict):
        kept = {key: without_leaf(child, name) for key, child in tree.items()}
        return {key: child for key, child in kept.items() if child is not None} or None
    children = [without_leaf(child, name) for child in tree]
    if isinstance(tree, Pair):
        return Pair(*children) if None not in children else None
    return type(tree)(child for child in children if child is not None) or None


def _has_tied(tree: Any) -> bool:
    names = list(leaf_paths(tree, "").values())
    return len(set(names)) < len(names)
