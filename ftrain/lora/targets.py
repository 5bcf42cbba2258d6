"""Which parameters an adapter changes: globs over paths and PEFT's short names, and how their matrices lie.

Legend: I inputs, O outputs, E experts.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ftrain.modules.hf_names import HfTensor
from ftrain.modules.spec import ParamSpec
from ftrain.sharding.paths import Rules, match

Kind = Literal["linear", "embedding", "experts", "convolution"]

ALL_LINEAR = "all-linear"
_TABLES = ("vocab", "position", "codebook")
_UNKNOWN = ("any", None)
_EMBEDDING = re.compile(r"(^|_)(emb|embed|embedding|embeddings|wte|wpe)($|_|\d)|embed|relative_attention_bias")
_ROUTERS = ("gate", "router")
_SUFFIX = (".weight", "")


@dataclass(frozen=True)
class Target:
    """A parameter that an adapter changes.

    - `path`, `shape`, `axes`: those of its `ParamSpec`.
    - `kind`: "linear" for a matrix, "embedding" for a table whose rows are looked up, "experts" for a stack
      `[E, ., .]` of matrices, "convolution" for a kernel of three dims or more.
    - `inputs_first`: stored `[I, O]` and applied as `x @ w`; else `[O, I]`, as torch stores linear layers.
    - `rank`, `scale`: of the delta `scale * a @ b`.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    kind: Kind
    inputs_first: bool
    rank: int
    alpha: float
    scale: float

    @property
    def experts(self) -> int | None:
        """How many matrices the parameter is a stack of; None for one."""
        return self.shape[0] if self.kind == "experts" else None

    @property
    def inputs(self) -> int:
        """I: features of the input, or rows of a table; of a convolution channels times taps."""
        return self._sides()[0 if self.inputs_first else 1][0]

    @property
    def outputs(self) -> int:
        """O: features of the output."""
        return self._sides()[1 if self.inputs_first else 0][0]

    @property
    def axes_of_sides(self) -> tuple[str | None, str | None]:
        """The logical axes of the input and the output."""
        sides = [axis for _, axis in self._sides()]
        first, last = sides if self.inputs_first else sides[::-1]
        return first, last

    def _sides(self) -> tuple[tuple[int, str | None], tuple[int, str | None]]:
        """Size and axis of the two sides of the matrix, in the order in which they are stored."""
        if self.kind != "convolution":
            return (self.shape[-2], self.axes[-2]), (self.shape[-1], self.axes[-1])
        if self.inputs_first:
            return (math.prod(self.shape[:-1]), None), (self.shape[-1], self.axes[-1])
        return (self.shape[0], self.axes[0]), (math.prod(self.shape[1:]), None)


def matched(
    leaves: Mapping[str, ParamSpec], targets: Sequence[str], exclude: Sequence[str], names: Iterable[HfTensor] = ()
) -> dict[str, str]:
    """The paths of the parameters that `targets` name, each with the target that named it.

    A target is a glob over whole paths (`layers.*.attention.w_*`), the last parts of a path or of a module
    ("q_proj", "self_attn.q_proj"), also of the names that a folder of Hugging Face's has for the parameter, or
    "all-linear". `exclude`: the same, taken out.

    ValueError for a target that matches nothing, with the nearest path, or nothing that is a matrix; and where nothing
    is left.
    """
    aliases = _aliases(leaves, names)
    gone = {path for glob in exclude for path in _named(leaves, aliases, glob, "exclude")}
    found: dict[str, str] = {}
    for target in targets:
        paths = _named(leaves, aliases, target, "targets")
        matrices = [path for path in paths if len(leaves[path].shape) > 1]
        if not matrices:
            shown = paths[0]
            raise ValueError(
                f"lora: {target!r} names {shown!r} of shape {list(leaves[shown].shape)}, which is no matrix: a delta "
                "of low rank needs an input and an output; train it whole, or leave it out"
            )
        for path in matrices:
            if path not in gone:
                found.setdefault(path, target)
    if not found:
        raise ValueError(f"lora: targets {list(targets)} without {list(exclude)} are none: give at least one matrix")
    return {path: found[path] for path in leaves if path in found}


def _named(leaves: Mapping[str, ParamSpec], aliases: Mapping[str, set[str]], target: str, what: str) -> list[str]:
    """The paths that a target names. ValueError for none."""
    if target == ALL_LINEAR:
        return [path for path in leaves if _is_linear_layer(path, leaves)]
    found = [path for path in leaves if match(path, target) or any(_ends(a, target) for a in aliases[path])]
    if not found:
        Rules({target: True}, of=f"lora.add({what}=...)").require_used(_shown(leaves, aliases, target))
    return found


def _shown(leaves: Mapping[str, ParamSpec], aliases: Mapping[str, set[str]], target: str) -> list[str]:
    """What the nearest name is looked for among: for a short target the last parts, else whole paths."""
    if "." in target or "*" in target:
        return list(leaves)
    return sorted({alias.rsplit(".", 1)[-1] for own in aliases.values() for alias in own})


def _ends(alias: str, target: str) -> bool:
    return alias == target or alias.endswith(f".{target}")


def _aliases(leaves: Mapping[str, ParamSpec], names: Iterable[HfTensor]) -> dict[str, set[str]]:
    """The paths and modules by which a parameter may be named."""
    found = {path: {path, path.removesuffix(".weight")} for path in leaves}
    for name in names:
        if name.leaf in found:
            found[name.leaf] |= {name.name, name.name.removesuffix(".weight")}
    return found


def _is_linear_layer(path: str, leaves: Mapping[str, ParamSpec]) -> bool:
    """True for a linear layer as PEFT's "all-linear" takes them: no head, router, table or convolution."""
    spec = leaves[path]
    kind = kind_of(path, spec)
    if "vocab" in spec.axes or len(spec.shape) < 2 or kind not in ("linear", "experts"):
        return False
    return not _is_router(path, leaves)


def _is_router(path: str, leaves: Mapping[str, ParamSpec]) -> bool:
    if path.rsplit(".", 1)[-1].startswith("w_router"):
        return True
    above, _, name = path.removesuffix(".weight").rpartition(".")
    return name in _ROUTERS and any(other.startswith(f"{above}.experts") for other in leaves)


def kind_of(path: str, spec: ParamSpec) -> Kind:
    """What a parameter of two dims or more is used for, by its logical axes and its name."""
    if spec.axes[0] == "expert" and len(spec.shape) == 3:
        return "experts"
    if len(spec.shape) > 2:
        return "convolution"
    module = path.removesuffix(".weight").rsplit(".", 1)[-1]
    is_table = spec.axes[0] in _TABLES[1:] or module.startswith("table_")
    return "embedding" if is_table or _EMBEDDING.search(module) or module == "shared" else "linear"


def inputs_first(path: str, spec: ParamSpec, kind: Kind, globs: Sequence[str], by_biases: bool) -> bool:
    """True for a weight that is stored `[I, O]`.

    `globs`: of those that are. `by_biases`: what the biases of the model say of its other matrices without named axes.
    """
    if any(match(path, glob) for glob in globs) or kind == "embedding":
        return True
    if kind == "convolution":
        return spec.axes[0] == "conv_kernel"
    axes = spec.axes[1:] if kind == "experts" else spec.axes
    if all(axis in _UNKNOWN for axis in axes):
        return by_biases and kind == "linear"
    return axes[0] != "vocab"


def biases_say_inputs_first(leaves: Mapping[str, ParamSpec]) -> bool:
    """True where biases are as long as the second dim of their weights: the layers of GPT-2 are stored `[I, O]`."""
    votes = 0
    for path, spec in leaves.items():
        bias = leaves.get(f"{path.removesuffix('.weight')}.bias") if path.endswith(".weight") else None
        if bias is not None and len(spec.shape) == 2 and spec.shape[0] != spec.shape[1]:
            votes += (bias.shape == spec.shape[1:]) - (bias.shape == spec.shape[:1])
    return votes > 0
