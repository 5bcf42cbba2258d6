"""Random states and batches: nested, tied, with copies, numbers, keys, and leaves that are views of others."""

import random
from dataclasses import dataclass, replace
from typing import Any

from experiments.bench.fuzzing.program import Pair, leaf_paths

Leaves = tuple[tuple[str, str], ...]


@dataclass
class Shapes:
    """Draws shapes that fit each other: `width` is that of rows. `dtype`: of leaves, as source."""

    rng: random.Random
    width: int
    low: str
    dicts_only: bool = False

    @property
    def dtype(self) -> str:
        """The dtype of floating leaves, as source."""
        return f"torch.{self.low}"

    def normal(self, *sizes: Any) -> str:
        """Source of normal numbers."""
        seed = self.rng.randint(1, 999)
        low = "" if self.low == "float64" else f", dtype={self.dtype}"
        return f"normal({', '.join(map(str, (seed, *sizes)))}{low})"

    def parameter(self) -> str:
        """Source of a parameter."""
        d, e = self.width, self.rng.choice((2, 3, 4))
        return self.normal(*self.rng.choice(((d, d), (d, d), (d,), (d,), (d, e), (), (6, d), (2, d, d), (d, 1))))


def random_tree(shapes: Shapes) -> tuple[Leaves, Any, list[str]]:
    """Leaves, the state's nesting, and the subtrees of parameters that losses may be differentiated by."""
    rng, leaves = shapes.rng, dict[str, str]()

    def leaf(kind: str, text: str) -> str:
        name = f"{kind}{len(leaves)}"
        leaves[name] = text
        return name

    def parameters() -> Any:
        names = [leaf("w", shapes.parameter()) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
        if rng.random() < 0.2:
            block = [shapes.parameter() for _ in range(rng.randint(1, 2))]
            count = rng.choice((2, 2, 3))
            layers = [{f"w{j}": leaf("w", _reseeded(rng, t)) for j, t in enumerate(block)} for _ in range(count)]
            return {**_numbered(names), "layers": layers}
        kind = "dict" if shapes.dicts_only else rng.choice(("dict", "dict", "list", "tuple", "pair"))
        if kind == "pair":
            return Pair(_numbered(names), [leaf("w", shapes.parameter())])
        return _numbered(names) if kind == "dict" else names if kind == "list" else tuple(names)

    state: dict[str, Any] = {"params": parameters()}
    subtrees = ['state["params"]']
    if rng.random() < 0.2:
        state["other"] = parameters()
        subtrees.append('state["other"]')
    if rng.random() < 0.3 and not shapes.dicts_only:
        subtrees.append(rng.choice(list(leaf_paths(state["params"], 'state["params"]'))))
    _add_others(shapes, state, leaf)
    return tuple(leaves.items()), state, subtrees


def _add_others(shapes: Shapes, state: dict[str, Any], leaf: Any) -> None:
    rng = shapes.rng
    inside = list(leaf_paths(state["params"], "").values())
    if rng.random() < 0.2:
        state["ema"] = _copied(state["params"], leaf)
    if rng.random() < 0.12:
        state["tied"] = rng.choice(inside)
    if rng.random() < 0.05:
        state["part"] = leaf("w", f"{rng.choice(inside)}[...]")
    if rng.random() < 0.35:
        state["moment"] = leaf("e", shapes.normal(shapes.width))
    if rng.random() < 0.15:
        mean, var = shapes.normal(shapes.width), f"{shapes.normal(shapes.width)}.abs()"
        state["statistics"] = {"mean": leaf("e", mean), "var": leaf("e", var)}
    if rng.random() < 0.3:
        state["step"] = leaf("i", rng.choice(("torch.tensor(0)", "torch.tensor([1, 2])", "3")))
    if rng.random() < 0.25:
        state["key"] = leaf("k", f"ftrain.key({rng.randint(0, 9)})")
    if rng.random() < 0.15:
        state["scale"] = leaf("c", rng.choice(("0.5", "2", "True", '"text"')))
    if rng.random() < 0.06:
        state["nothing"] = {} if rng.random() < 0.5 else ()
    if rng.random() < 0.08:
        state["turned"] = leaf("e", f"{shapes.normal(shapes.width, 3)}.t()")


def _numbered(names: list[str]) -> dict[str, str]:
    return {f"w{i}": name for i, name in enumerate(names)}


def _copied(tree: Any, leaf: Any) -> Any:
    if isinstance(tree, str):
        return leaf("e", f"{tree}.clone()")
    if isinstance(tree, dict):
        return {key: _copied(child, leaf) for key, child in tree.items()}
    children = [_copied(child, leaf) for child in tree]
    return Pair(*children) if isinstance(tree, Pair) else type(tree)(children)


def _reseeded(rng: random.Random, text: str) -> str:
    return f"normal({rng.randint(1, 999)}{text[text.index(',') if ',' in text else -1 :]}"


def random_batch(rng: random.Random, shapes: Shapes, micro: int, *, low: str | None) -> Leaves:
    """Key to source over `rows`; with micro-batches their number is the first dim. `low`: the dtype of numbers."""
    shapes = replace(shapes, low=low or shapes.low)
    first = ("rows",) if micro == 1 else (micro, "rows")
    sizes = ", ".join(map(str, first))
    return (
        ("x", shapes.normal(*first, shapes.width)),
        ("y", shapes.normal(*first, shapes.width)),
        ("i", f"(torch.arange({' * '.join(map(str, first))}) * 7 % 5).view({sizes})"),
    )
