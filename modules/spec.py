"""Parameter specs: the single source of truth for a model's parameters (names, shapes, axes, initial values).

A model's `specs(cfg)` is a tree of nested dicts and lists whose leaves are `ParamSpec`s. Everything else follows from
it: initial values, shapes without memory, counts, checks of loaded weights, and (through `axes`) how a plan splits
them. A leaf's name is its path joined with dots: `layers.0.moe.w_gate_EDF`. Leaves come in the order of sorted dict
keys, the order that optree flattens in.
"""

import difflib
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.primitive import primitive
from ftrain.sharding import logical_axes

Tree = Any  # nested dicts with string keys and lists, of one kind of leaf: what static types cannot say usefully


@dataclass(frozen=True)
class Normal:
    """Independent normal numbers with mean 0."""

    std: float

    def sample(self, key: Tensor, shape: tuple[int, ...], *, window: random.Window | None = None) -> Tensor:
        """Float32 numbers of `shape`, or its `window`."""
        return random.normal(key, shape, std=self.std, window=window)


@dataclass(frozen=True)
class TruncatedNormal:
    """Normal numbers of deviation `std` *before* those beyond two deviations are cut away."""

    std: float

    def sample(self, key: Tensor, shape: tuple[int, ...], *, window: random.Window | None = None) -> Tensor:
        """Float32 numbers of `shape`, or its `window`."""
        return random.truncated_normal(key, shape, std=self.std, window=window)


@dataclass(frozen=True)
class Uniform:
    """Uniform numbers in `[-bound, bound)`."""

    bound: float

    def sample(self, key: Tensor, shape: tuple[int, ...], *, window: random.Window | None = None) -> Tensor:
        """Float32 numbers of `shape`, or its `window`."""
        return random.uniform(key, shape, low=-self.bound, high=self.bound, window=window)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def sample(self, key: Tensor, shape: tuple[int, ...], *, window: random.Window | None = None) -> Tensor:
        """Float32 numbers of `shape`, or its `window`; the key only tells the device."""
        size = shape if window is None else tuple(window.size)
        return torch.full(size, float(self.value), dtype=torch.float32, device=key.device)


Init = Normal | TruncatedNormal | Uniform | Constant


def zeros() -> Constant:
    """All zeros: biases."""
    return Constant(0.0)


def ones() -> Constant:
    """All ones: the weights of norms."""
    return Constant(1.0)


def fan_in(fan: int, *, gain: float = 1.0) -> Normal:
    """Deviation `gain / sqrt(fan)`: with `gain` 1 a sum over `fan` inputs keeps their variance (LeCun et al. 1998).

    ValueError for a `fan` below 1.

    >>> fan_in(64).std
    0.125
    """
    if fan < 1:
        raise ValueError(f"fan_in needs at least one input, got {fan}")
    return Normal(gain / math.sqrt(fan))


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, what each dim means (`ftrain.sharding.logical_axes`, `None`: never split), initial
    values.

    Raises `ValueError` where `axes` does not name every dim, or names an unknown axis.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"a parameter of shape {self.shape} needs {len(self.shape)} logical axes, got {self.axes}")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"every dim of a parameter needs a size of at least 1, got {self.shape} ({self.axes})")
        logical_axes.check(self.axes)

    @property
    def elements(self) -> int:
        """How many numbers the parameter holds."""
        return math.prod(self.shape)


def leaves_with_paths(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted path, leaf)` of every leaf of a tree of specs or parameters, dict keys sorted.

    ValueError for a key that is no text, is empty or holds a dot.

    >>> list(leaves_with_paths({"b": 1, "a": [{"w": 2}]}))
    [('a.0.w', 2), ('b', 1)]
    """
    if not isinstance(tree, dict | list):
        yield path, tree
        return
    for name, child in _children(tree):
        yield from leaves_with_paths(child, _join(path, name))


def map_with_paths(function: Callable[[str, Any], Any], tree: Tree, path: str = "") -> Tree:
    """The same tree with `function(path, leaf)` in the place of each leaf.

    >>> map_with_paths(lambda path, leaf: f"{path}={leaf}", {"a": [1, 2]})
    {'a': ['a.0=1', 'a.1=2']}
    """
    if isinstance(tree, dict):
        return {key: map_with_paths(function, child, _join(path, key)) for key, child in tree.items()}
    if isinstance(tree, list):
        return [map_with_paths(function, child, _join(path, str(i))) for i, child in enumerate(tree)]
    return function(path, tree)


def init(specs: Tree, key: Tensor, *, device: torch.device | str | None = None) -> Tree:
    """Initial parameters on `device` (default: the key's).

    A leaf's numbers depend on `key` (int64 `[2]`), its path, shape and initializer alone: not on the device, nor on
    what else is in the tree. ValueError where a leaf is no `ParamSpec` or `key` no key.

    >>> specs = {"layers": [{"w": ParamSpec((2, 3), ("embed", "mlp"), fan_in(2))}]}
    >>> params = init(specs, random.key(0))
    >>> list(params["layers"][0]["w"].shape)
    [2, 3]
    """
    strange = [path for path, spec in leaves_with_paths(specs) if not isinstance(spec, ParamSpec)]
    if strange or not isinstance(key, Tensor):
        found = f"{strange[0] or 'the tree'!s} is none" if strange else f"the key is {key!r}"
        raise ValueError(
            f"init takes a tree of ParamSpecs, such as decoder.specs(cfg), and a key, ftrain.key(seed); {found}"
        )
    key = key if device is None else key.to(device)
    return map_with_paths(lambda path, spec: init_leaf(spec, key, path), specs)


@primitive("parameter")
def init_leaf(spec: ParamSpec, key: Tensor, path: str, window: random.Window | None = None) -> Tensor:
    """The leaf called `path` in the tree that `init` makes from `key` (int64 `[2]`), or only a `window` of it.

    A window of the global array holds the numbers that the whole array has there, so a rank can make its own shard: a
    plan rebinds this primitive to do so.
    """
    leaf_key = random.fold_in(key, zlib.crc32(path.encode()))
    return spec.init.sample(leaf_key, spec.shape, window=window).to(spec.dtype)


def abstract(specs: Tree) -> Tree:
    """The parameters as meta tensors: shapes and dtypes, no memory.

    >>> specs = {"layers": [{"w": ParamSpec((2, 3), ("embed", "mlp"), fan_in(2))}]}
    >>> abstract(specs)["layers"][0]["w"].device.type
    'meta'
    """
    return map_with_paths(lambda _, spec: torch.empty(spec.shape, dtype=spec.dtype, device="meta"), specs)


def of(params: Tree) -> Tree:
    """Specs of a tree of tensors (dicts and lists), e.g. `dict(module.named_parameters())`, for `jit(specs=...)`.

    Dims get no meaning of their own, so a plan divides each tensor on the first dim that suits; new values are zeros.
    """
    return map_with_paths(lambda _, p: ParamSpec(tuple(p.shape), ("any",) * p.dim(), zeros(), p.dtype), params)


def put(tree: Tree, part: Tree) -> Tree:
    """The tree with the leaves of `part`, which has some of the keys, in the place of its own; nothing is copied.

    ValueError where `part` has what the tree lacks.

    >>> put({"a": 1, "layers": [{"w": 2}, {"w": 3}]}, {"layers": [{}, {"w": 9}]})
    {'a': 1, 'layers': [{'w': 2}, {'w': 9}]}
    """
    return _put(tree, part, "")


def _put(tree: Tree, part: Tree, path: str) -> Tree:
    if isinstance(part, list) and isinstance(tree, list) and len(part) == len(tree):
        return [_put(*both, _join(path, str(i))) for i, both in enumerate(zip(tree, part, strict=True))]
    if isinstance(part, dict) and isinstance(tree, dict):
        strange = [key for key in part if key not in tree]
        if strange:
            raise ValueError(f"{_join(path, strange[0])!r} is not in the tree that it is put into")
        return {k: _put(child, part[k], _join(path, k)) if k in part else child for k, child in tree.items()}
    if isinstance(part, dict | list) or isinstance(tree, dict | list):
        raise ValueError(f"{path or 'the tree'}: the two trees differ in kind or length here")
    return part


def count(specs: Tree) -> int:
    """How many numbers the parameters hold together.

    >>> specs = {"layers": [{"w": ParamSpec((2, 3), ("embed", "mlp"), fan_in(2))}]}
    >>> count(specs)
    6
    """
    return sum(spec.elements for _, spec in leaves_with_paths(specs))


def bytes(specs: Tree) -> int:
    """How many bytes the parameters take, each in its own dtype.

    >>> specs = {"layers": [{"w": ParamSpec((2, 3), ("embed", "mlp"), fan_in(2))}]}
    >>> bytes(specs)
    24
    """
    return sum(spec.elements * spec.dtype.itemsize for _, spec in leaves_with_paths(specs))


def check(params: Tree, specs: Tree) -> None:
    """Raise `ValueError` where `params` is not what `specs` describe.

    Names the path and: the missing key; the unknown key with the nearest known one; or the shape or dtype that was
    expected and found.

    >>> specs = {"w": ParamSpec((2, 3), ("embed", "mlp"), fan_in(2))}
    >>> check({"w": torch.zeros(3, 2)}, specs)
    Traceback (most recent call last):
    ValueError: w: expected shape [2, 3] ('embed', 'mlp'), found [3, 2]
    """
    _check(params, specs, "")


def _check(params: Tree, specs: Tree, path: str) -> None:
    where = path or "the tree of parameters"
    if isinstance(specs, ParamSpec):
        _check_leaf(params, specs, where)
        return
    if type(params) is not type(specs):
        raise ValueError(f"{where}: expected a {type(specs).__name__}, found a {type(params).__name__}")
    expected, found = dict(_children(specs)), dict(_children(params))
    unknown = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    if unknown:
        near = difflib.get_close_matches(unknown[0], missing or list(expected), n=1, cutoff=0.0)
        hint = f"; nearest known: {_join(path, near[0])!r}" if near else ""
        raise ValueError(f"unknown parameter {_join(path, unknown[0])!r}{hint}")
    if missing:
        raise ValueError(f"missing parameter {_join(path, missing[0])!r} ({len(missing)} missing in {where})")
    for name, child in expected.items():
        _check(found[name], child, _join(path, name))


def _check_leaf(param: Any, spec: ParamSpec, where: str) -> None:
    if not isinstance(param, Tensor):
        raise ValueError(f"{where}: expected a tensor of shape {list(spec.shape)}, found a {type(param).__name__}")
    if tuple(param.shape) != spec.shape:
        raise ValueError(f"{where}: expected shape {list(spec.shape)} {spec.axes}, found {list(param.shape)}")
    if param.dtype != spec.dtype:
        raise ValueError(f"{where}: expected dtype {spec.dtype}, found {param.dtype}")


def _children(tree: dict[str, Any] | list[Any]) -> list[tuple[str, Any]]:
    """`(name, child)` of a dict, keys sorted, or of a list; a key that would make dotted paths ambiguous is refused."""
    if isinstance(tree, list):
        return [(str(i), child) for i, child in enumerate(tree)]
    for key in tree:
        if not isinstance(key, str) or not key or "." in key:
            raise ValueError(f"{key!r} cannot name a parameter: use a non-empty string without dots")
    return sorted(tree.items())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
