"""An adapter: low-rank deltas of some of a model's parameters, described before anything is made.

The delta of a weight at path `p` is a pair of matrices at `p_lora.A` `[I, r]` and `p_lora.B` `[r, O]`, for experts with
E first, so that `x @ (w + scale * A @ B)` is what the layer computes; with DoRA there is `p_lora.magnitude` `[O]` too.
They are parameters like any others: their logical axes are those of the weight's sides and "rank".

Legend: I inputs, O outputs, E experts, r rank.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ftrain.lora.dora import with_magnitudes
from ftrain.lora.targets import Target, biases_say_inputs_first, inputs_first, kind_of, matched
from ftrain.lora.trees import beside, joined
from ftrain.modules import spec as spec_tree
from ftrain.modules.hf_names import HfTensor
from ftrain.modules.spec import Constant, Normal, ParamSpec, Tree, Uniform, leaves_with_paths, zeros


@dataclass(frozen=True)
class Adapter:
    """What `add` has made: which parameters have deltas, and of which kind.

    - `targets`: the changed parameters, in the order of their paths.
    - `named_by`: the target, as the caller wrote it, that named each path.
    - `base`: the specs of the model. `names`: its names in Hugging Face's folders, where they are others.
      `other_names`: those in files of other programs, by the style of `save_file`.
    - `rslora`: deltas are scaled by `alpha / sqrt(rank)`. `dora`: weights have a magnitude of their own.
    - `dropout`: share of a layer's input that its delta does not see, where `bind` has a key.
    """

    targets: tuple[Target, ...]
    base: Tree = field(repr=False, compare=False)
    named_by: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    names: tuple[HfTensor, ...] = field(default=(), repr=False, compare=False)
    other_names: Mapping[str, tuple[HfTensor, ...]] = field(default_factory=dict, repr=False, compare=False)
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0

    @property
    def specs(self) -> Tree:
        """The `ParamSpec`s of the deltas, a tree with the lists and dicts of the model's as far as they have any."""
        return self.tree({target.path: specs_of(target, dora=self.dora) for target in self.targets})

    def tree(self, entries: Mapping[str, Any]) -> Tree:
        """A tree shaped as `specs` of values by the path of their parameter."""
        return beside(self.base, entries)

    def all_specs(self) -> Tree:
        """The specs of the model and of the deltas in one tree, for `jit(specs=...)` and checkpoints."""
        return joined(self.base, self.specs)

    def init(self, key: Tensor, *, base: Tree = None) -> Tree:
        """New deltas, on the device of `key` (int64 `[2]`), with which every layer still computes what it did.

        `A` begins uniform with the variance of a linear layer of torch, `B` with zeros, as PEFT's; for a table it is
        the other way round. `base`: the parameters of the model, which DoRA measures. ValueError for DoRA without.
        """
        made = spec_tree.init(self.specs, key)
        if not self.dora:
            return made
        if base is None:
            raise ValueError("lora: magnitudes of DoRA begin as the norms of the model's weights: give init(base=...)")
        return with_magnitudes(made, base, self.targets)

    def table(self) -> str:
        """One line for each parameter that is changed: path, shape, kind, rank, scale, numbers, and who named it."""
        rows = [("parameter", "shape", "kind", "rank", "scale", "numbers", "target")]
        for t in self.targets:
            numbers = sum(s.elements for s in specs_of(t, dora=self.dora).values())
            shape = "x".join(map(str, t.shape))
            rows.append((t.path, shape, t.kind, f"{t.rank}", f"{t.scale:g}", f"{numbers:,}", self.named_by[t.path]))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        of, trained = spec_tree.count(self.base), spec_tree.count(self.specs)
        return "\n".join([*lines, f"{len(self.targets)} parameters changed, {trained:,} numbers trained of {of:,}"])


def add(
    model: Any,
    targets: str | Sequence[str],
    *,
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
    exclude: Sequence[str] = (),
    inputs_first: Sequence[str] = (),
    names: Sequence[HfTensor] = (),
) -> Adapter:
    """Deltas of rank `rank` for the parameters that `targets` name.

    - `model`: a `Model`, or the tree of its `ParamSpec`s.
    - `targets`, `exclude`: globs over paths, last parts of names ("q_proj"), "all-linear" (`ftrain.lora.targets`).
    - `alpha`: deltas are scaled by `alpha / rank` (`rslora`: by `alpha / sqrt(rank)`, arXiv 2312.03732); `rank` if
      None.
    - `dora`: directions and magnitudes apart (arXiv 2402.09353). `dropout`: of the deltas' inputs, in [0, 1).
    - `inputs_first`: globs of weights stored `[I, O]`, where neither axes nor biases tell.
    - `names`: of the model in Hugging Face's folders; those of the `Model` if none are given.

    ValueError for a target that matches nothing (with the nearest path) or no matrix, for numbers out of range, and for
    kinds of parameters that DoRA or dropout does not have.

    >>> from ftrain import lora
    >>> from ftrain.modules import decoder
    >>> adapter = lora.add(decoder.specs(decoder.preset("llama-tiny")), "layers.*.attention.w_[qv]_*", rank=4, alpha=8)
    >>> [target.path for target in adapter.targets][:2], adapter.targets[0].scale
    (['layers.0.attention.w_q_DHK', 'layers.0.attention.w_v_DGK'], 2.0)
    """
    _require_range(rank, alpha, dropout)
    base = getattr(model, "specs", model)
    names = tuple(names or getattr(model, "names", ()))
    others = dict(getattr(model, "other_names", {}))
    leaves = dict(leaves_with_paths(base))
    known = [*names, *(name for own in others.values() for name in own)]
    found = matched(leaves, [targets] if isinstance(targets, str) else targets, exclude, known)
    alpha = float(rank if alpha is None else alpha)
    how = _Orientation(tuple(inputs_first), biases_say_inputs_first(leaves))
    made = tuple(target_of(path, leaves[path], rank, alpha, how.of, rslora=rslora) for path in found)
    for target in made:
        _require_possible(target, dora=dora, dropout=dropout)
    return Adapter(made, base, found, names, others, rslora=rslora, dora=dora, dropout=dropout)


@dataclass(frozen=True)
class _Orientation:
    globs: tuple[str, ...]
    by_biases: bool

    def of(self, path: str, spec: ParamSpec) -> bool:
        return inputs_first(path, spec, kind_of(path, spec), self.globs, self.by_biases)


def target_of(
    path: str, spec: ParamSpec, rank: int, alpha: float, first: Callable[[str, ParamSpec], bool], *, rslora: bool
) -> Target:
    """The target at `path`. `first(path, spec)`: whether its inputs come first."""
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    return Target(path, spec.shape, spec.axes, kind_of(path, spec), first(path, spec), rank, alpha, scale)


def specs_of(target: Target, *, dora: bool) -> dict[str, ParamSpec]:
    """`A` `[I, r]`, `B` `[r, O]`, and with DoRA `magnitude` `[O]`; with experts E comes first."""
    many = () if target.experts is None else (target.experts,)
    stacked: tuple[str | None, ...] = ("expert",) * len(many)
    into, out = target.axes_of_sides
    first, last = Uniform(1 / math.sqrt(target.inputs)), zeros()
    if target.kind == "embedding":
        begin: tuple[Uniform | Constant | Normal, ...] = (zeros(), Normal(1.0))
    else:
        begin = (first, last)
    made = {
        "A": ParamSpec((*many, target.inputs, target.rank), (*stacked, into, "rank"), begin[0]),
        "B": ParamSpec((*many, target.rank, target.outputs), (*stacked, "rank", out), begin[1]),
    }
    return {**made, "magnitude": ParamSpec((target.outputs,), (out,), Constant(1.0))} if dora else made


def _require_range(rank: int, alpha: float | None, dropout: float) -> None:
    if rank < 1:
        raise ValueError(f"lora: rank={rank} must be at least 1")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"lora: alpha={alpha} must be above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora: dropout={dropout} must be in [0, 1)")


def _require_possible(target: Target, *, dora: bool, dropout: float) -> None:
    if dora and target.kind in ("embedding", "experts"):
        raise ValueError(
            f"lora: {target.path!r} is of kind {target.kind}, for which DoRA is not defined here: leave it out "
            f"(exclude=[{target.path!r}]), or take dora=False"
        )
    if dropout and target.kind == "experts":
        raise ValueError(
            f"lora: {target.path!r} is a stack of experts, whose rows are no tokens in order: dropout must be 0 there"
        )
