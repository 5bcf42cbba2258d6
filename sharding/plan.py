"""Plans: a mesh, a default layout, and layouts of components by the path of their parameters."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, Never

from ftrain.sharding.batch import BatchRule, TokenOrder, default_rule, may_be_missing
from ftrain.sharding.layout import Hybrid, Layout, Ring
from ftrain.sharding.link import Link
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.paths import Rules
from ftrain.sharding.placement import Placement, place


class Plan:
    """How a model runs on a mesh: a layout for each component, and how the batch is divided.

    - `mesh`: the ranks.
    - `default`: the layout of components that no glob names.
    - `components`: globs over the paths of parameters ("encoders", "foundation.layers.*.moe") -> `Layout`.
    - `batch`: globs over the paths of the batch -> a rule (`Tokens`, `BatchRows`, `TokenIndices`, `Replicated`,
      `Offsets`). Without a match a leaf has one entry per token in dim 0, but for the offsets of `Documents`, which are
      those of packs, and for what is called `key`, which all ranks see. Leaves that are named by no rule must have
      equally many entries: what another one is, its rule must say (`Replicated()` for a table).
    - `link`: what a message costs, by which communication is bucketed and hidden.

    A glob names a leaf or a node and holds for all below it; the most specific decides (`ftrain.sharding.paths`).
    ValueError for globs as keyword arguments, values that are no `Layout`, hybrids that do not divide the sequence
    axis, and rings of different sizes.

    >>> from ftrain import Layout, Mesh, Plan
    >>> from ftrain.modules.spec import ParamSpec, zeros
    >>> specs = {"w": ParamSpec((64, 10), ("embed", "vocab"), zeros()), "b": ParamSpec((10,), (None,), zeros())}
    >>> plan = Plan(Mesh(shard=4, kind="virtual"), components={"b": Layout(())})
    >>> print(plan.describe(specs))
    parameter  shape     placement                                     a rank's shape  bytes per rank
    b          [10]      copies over shard                             [10]            40
    w          [64, 10]  dim 0 over shard+sequence (4)                 [16, 10]        640
    total                replicate 1 x shard 4 x sequence 1, expert 1                  680
    """

    def __init__(
        self,
        mesh: Mesh,
        default: Layout = Layout(),  # noqa: B008  # frozen
        *,
        components: Mapping[str, Layout] = MappingProxyType({}),
        batch: Mapping[str, BatchRule] = MappingProxyType({}),
        link: Link = Link(),  # noqa: B008  # frozen
        **misplaced: Never,
    ) -> None:
        if misplaced:
            raise ValueError(_in_its_place(misplaced))
        for name, layout in (("default", default), *components.items()):
            if not isinstance(layout, Layout):
                raise ValueError(f"the plan's layout of {name!r} is {layout!r}, not a ftrain.sharding.Layout")
        self.mesh, self.default, self.link = mesh, default, link
        self.components, self.batch = dict(components), dict(batch)
        self._layouts = Rules(self.components, "Plan(components=...)", below=True)
        self._batch = Rules(self.batch, "Plan(batch=...)", below=True)
        _check_heads_free(self)

    def layout(self, path: str) -> Layout:
        """The layout of the component that the parameter, or component, at `path` belongs to.

        ValueError where two globs that decide differently are equally specific.

        >>> from ftrain import Layout, Mesh, Plan
        >>> plan = Plan(Mesh(shard=4, kind="virtual"), components={"layers.*.attention": Layout(("shard",))})
        >>> plan.layout("layers.3.attention.w_q").parameters, plan.layout("layers.3.mlp.w_up").parameters
        (('shard',), ('shard', 'sequence'))
        """
        return self._layouts.find(path, self.default) or self.default

    @cached_property
    def order(self) -> TokenOrder:
        """How the ranks of the sequence axis share the tokens of a pack."""
        ranks = self.mesh.sequence
        for layout in (self.default, *self.components.values()):
            if isinstance(layout.sequence, Ring):
                return TokenOrder(ranks, ranks, layout.sequence.zigzag)
            if isinstance(layout.sequence, Hybrid):
                return TokenOrder(ranks, ranks // layout.sequence.ulysses, layout.sequence.zigzag)
        return TokenOrder(ranks)

    def placement(self, path: str, spec: Any) -> Placement:
        """Where the pieces of the parameter at `path` are; `spec` has `shape` and `axes` (a
        `ftrain.modules.spec.ParamSpec`).

        ValueError names the path and the size that does not divide.
        """
        layout = self.layout(path)
        try:
            return place(
                spec.shape,
                spec.axes,
                mesh=self.mesh,
                parameters=layout.parameters,
                experts=layout.experts is not None,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def placements(self, specs: Any) -> dict[str, Placement]:
        """The placement of every parameter, by path. `specs`: a tree of `ftrain.modules.spec.ParamSpec`.

        ValueError for a glob of `components` that matches no parameter, a leaf that is no spec, and as in `placement`.
        """
        leaves = dict(_walk(specs, ""))
        self._layouts.require_used(leaves)
        return {path: self.placement(path, spec) for path, spec in leaves.items()}

    def batch_rule(self, path: str) -> BatchRule:
        """How the batch's leaf at `path` is divided; the most specific glob that matches decides.

        ValueError where two globs that decide differently are equally specific.

        >>> from ftrain import Mesh, Plan
        >>> from ftrain.sharding import BatchRows
        >>> plan = Plan(Mesh(shard=4, kind="virtual"), batch={"images": BatchRows()})
        >>> plan.batch_rule("images.pixels"), plan.batch_rule("tokens")
        (BatchRows(dim=0), Tokens(dim=0))
        """
        return self._batch.find(path) or default_rule(path)

    def names_batch_leaf(self, path: str) -> bool:
        """True where a rule of the plan is about the batch's leaf at `path` in particular: not by `*` alone.

        ValueError as in `batch_rule`.
        """
        return self._batch.names(path)

    def require_batch(self, paths: Iterable[str]) -> None:
        """ValueError that names a glob of `batch` which matches none of these paths, and the nearest of them."""
        self._batch.require_used(paths, unless=may_be_missing)

    def describe(self, specs: Any) -> str:
        """A table of all parameters: path, shape, how each dim is divided, a rank's shape and bytes; and the sum of
        bytes.

        `specs`: a tree of `ftrain.modules.spec.ParamSpec`. ValueError as in `placements`.
        """
        rows = [("parameter", "shape", "placement", "a rank's shape", "bytes per rank")]
        total = 0
        leaves = dict(_walk(specs, ""))
        for path, placement in self.placements(specs).items():
            dtype = _stored_dtype(leaves[path], self.layout(path))
            size = dtype.itemsize
            for n in placement.local_shape:
                size *= n
            total += size
            local = _dims(placement.local_shape)
            rows.append((path, _dims(placement.shape), _words(placement), local, f"{size:,}"))
        rows.append(("total", "", str(self.mesh), "", f"{total:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _in_its_place(misplaced: Mapping[str, Any]) -> str:
    """What to write instead of keywords that `Plan` does not take: globs are keys of a mapping."""
    taken = ("mesh", "default", "components", "batch", "link")
    given = ", ".join(f"{name}={value!r}" for name, value in misplaced.items())
    if not all(isinstance(value, Layout) for value in misplaced.values()):
        return f"Plan({given}): a plan takes {', '.join(taken)}"
    written = ", ".join(f"{name!r}: {value!r}" for name, value in misplaced.items())
    return f"Plan({given}): layouts of components are one mapping, write Plan(mesh, components={{{written}}})"


def _stored_dtype(spec: Any, layout: Layout) -> Any:
    import torch

    return spec.dtype if layout.dtype is None else getattr(torch, layout.dtype)


def _walk(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if hasattr(tree, "shape") and hasattr(tree, "axes"):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key in sorted(tree):
            yield from _walk(tree[key], f"{path}.{key}" if path else key)
    elif isinstance(tree, list | tuple):
        for i, child in enumerate(tree):
            yield from _walk(child, f"{path}.{i}" if path else str(i))
    elif tree is not None:
        raise ValueError(
            f"specs: {path or 'the tree'!r} is a {type(tree).__name__}, not a ParamSpec (ftrain.modules.spec.of)"
        )


def _dims(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _words(placement: Placement) -> str:
    words = [f"dim {s.dim} over {'+'.join(s.axes)} ({s.size})" for s in placement.splits]
    if placement.copies:
        words.append(f"copies over {'+'.join(placement.copies)}")
    return ", ".join(words) or "one copy"


def _check_heads_free(plan: Plan) -> None:
    """All rings of a plan must share one order of tokens; a hybrid's inner size must divide the axis."""
    rings: dict[tuple[int, bool], str] = {}
    for name, layout in (("default", plan.default), *plan.components.items()):
        how = layout.sequence
        if isinstance(how, Hybrid):
            if how.ulysses < 1 or plan.mesh.sequence % how.ulysses:
                raise ValueError(
                    f"{name}: Hybrid(ulysses={how.ulysses}) does not divide sequence={plan.mesh.sequence}; it may be "
                    f"{[n for n in range(1, plan.mesh.sequence + 1) if plan.mesh.sequence % n == 0]}"
                )
            rings[(plan.mesh.sequence // how.ulysses, how.zigzag)] = name
        elif isinstance(how, Ring):
            rings[(plan.mesh.sequence, how.zigzag)] = name
    if len(rings) > 1:
        raise ValueError(
            f"components {' and '.join(rings.values())} want rings of different sizes {sorted(rings)}, but the tokens "
            "of a pack have one order: give them the same Ring or Hybrid"
        )
