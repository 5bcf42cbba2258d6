"""Counter-based random numbers: a number depends on its key and its index alone.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
in plain int64 tensor operations, so that every device, eager or traced, and every layout of the mesh sees equal bits.
A key is an int64 tensor `[2]` of two 32-bit words. Number `i` of a row-major `shape` is word `i % 4` of the block whose
counter is `i // 4` (float64 numbers take words `2i` and `2i + 1`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.philox import FOLD, MASK, SPLIT, UNIFORM_BITS, philox_key, philox_numbers


class Window(NamedTuple):
    """A slice of a global array, of which a rank draws its part: one start and one size for each dim.

    - `start`: the index of the first element, an int or a 0-d int64 tensor (a rank's coordinate is an input of a graph,
      not a constant). Only ints are checked against the global shape.
    - `size`: how many elements of each dim.
    """

    start: tuple[int | Tensor, ...]
    size: tuple[int, ...]


def key(seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """The key of a seed, int64 `[2]` on `device`, from which all random numbers of a run follow.

    `seed`: a Python int of 64 bits, -2**63 <= seed < 2**64; else ValueError.

    >>> import ftrain
    >>> ftrain.key(7)
    tensor([7, 0])
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"a seed is a whole number, not {seed!r}")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed {seed} does not fit in 64 bits")
    words = [torch.full((1,), (seed >> shift) & MASK, dtype=torch.int64, device=device) for shift in (0, 32)]
    return torch.cat(words)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key for `(key, data)`, e.g. for a step or a layer: int64 `[2]`.

    `key`: int64 `[2]`. `data`: an int, or an int64 tensor of any shape, which gives keys `[..., 2]`. ValueError for a
    key of another dtype or shape, and for an int that does not fit in int64.

    >>> import ftrain
    >>> step_key = ftrain.fold_in(ftrain.key(0), 3)
    >>> step_key.shape
    torch.Size([2])
    """
    _check_key(key)
    if isinstance(data, int):
        if not -(1 << 63) <= data < 1 << 63:
            raise ValueError(f"fold_in: {data} does not fit in int64")
        data = torch.full((), data, dtype=torch.int64, device=key.device)
    return philox_key(key, data, FOLD)


def split(key: Tensor, n: int = 2) -> Tensor:
    """`n` new keys, int64 `[n, 2]`; row `i` does not depend on `n`. `key`: int64 `[2]`.

    ValueError for less than no keys, and for a key of another dtype or shape.

    >>> import ftrain
    >>> weights, dropout = ftrain.split(ftrain.key(0))
    >>> bool((ftrain.split(ftrain.key(0), 5)[1] == dropout).all())
    True
    """
    _check_key(key)
    if n < 0:
        raise ValueError(f"split: there are no {n} keys; ask for 0 or more")
    return philox_key(key, torch.arange(n, device=key.device), SPLIT)


def bits(key: Tensor, shape: tuple[int, ...], *, window: Window | None = None) -> Tensor:
    """Random 32-bit words as int64 in [0, 2**32), of `shape` or of its `window`, on the device of the key.

    `key`: int64 `[2]`. ValueError for a key of another dtype or shape, a negative size, or a window outside of the
    shape.

    >>> import ftrain
    >>> words = ftrain.bits(ftrain.key(0), (4,))
    >>> bool(((words >= 0) & (words < 2**32)).all())
    True
    """
    return _draw(key, shape, window, "bits", torch.int64)


def uniform(
    key: Tensor,
    shape: tuple[int, ...],
    *,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
    window: Window | None = None,
) -> Tensor:
    """Uniform numbers in [low, high) of `shape`, or of its `window`, in `dtype` on the device of the key.

    - `key`: int64 `[2]`; equal keys give equal numbers.
    - `dtype`: float32, float64, float16 or bfloat16. Numbers are multiples of `(high - low) * 2**-b`, b the bits of its
      significand (24, 53, 11, 8), so `high` itself is never drawn.
    - `window`: the part of the global array that this rank holds; its numbers are those of the whole array.

    ValueError for a key of another dtype or shape, another `dtype`, a negative size, or a window outside of the shape.

    >>> import ftrain
    >>> u = ftrain.uniform(ftrain.key(0), (1000,), low=2.0, high=3.0)
    >>> bool(u.min() >= 2.0 and u.max() < 3.0)
    True
    """
    u = _draw(key, shape, window, "uniform", dtype)
    return u if (low, high) == (0.0, 1.0) else u * (high - low) + low


def normal(
    key: Tensor,
    shape: tuple[int, ...],
    *,
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    window: Window | None = None,
) -> Tensor:
    """Normal numbers of `shape`, or of its `window`, in `dtype` on the device of the key.

    - `key`: int64 `[2]`; equal keys give equal numbers.
    - `mean`, `std`: of the distribution.
    - `dtype`: float32, float64, float16 or bfloat16.
    - `window`: the part of the global array that this rank holds; its numbers are those of the whole array.

    Made by the inverse distribution function of one 32-bit word (float64: of 52 bits), evaluated at the middle of each
    of the 2**32 (2**52) steps. Numbers are therefore symmetric and finite: the largest is 6.3 (8.2) standard
    deviations. ValueError for a key of another dtype or shape, another `dtype`, a negative size, or a window outside of
    the shape.

    >>> import ftrain
    >>> w = ftrain.normal(ftrain.key(0), (256, 64), std=0.02)
    >>> w.shape, bool((w == ftrain.normal(ftrain.key(0), (256, 64), std=0.02)).all())
    (torch.Size([256, 64]), True)
    """
    z = _draw(key, shape, window, "normal", dtype)
    return z if (mean, std) == (0.0, 1.0) else z * std + mean


def truncated_normal(
    key: Tensor,
    shape: tuple[int, ...],
    *,
    std: float,
    mean: float = 0.0,
    bound: float = 2.0,
    dtype: torch.dtype = torch.float32,
    window: Window | None = None,
) -> Tensor:
    """Normal numbers conditioned on lying within `bound` standard deviations of the mean, of `shape` or of its
    `window`.

    - `key`: int64 `[2]`. `dtype`, `window`: as in `normal`.
    - `std`: that of the normal before truncation, as in `torch.nn.init.trunc_normal_`; with `bound=2` the numbers
      themselves have 0.88 of it.
    - `bound`: in standard deviations, above 0.

    ValueError for a bound that is not positive, and in the cases of `normal`.

    >>> import ftrain
    >>> w = ftrain.truncated_normal(ftrain.key(0), (1000,), std=0.5)
    >>> bool(w.abs().max() <= 1.0)
    True
    """
    if not bound > 0:
        raise ValueError(f"truncated_normal: bound={bound} must be positive (in standard deviations)")
    z = _draw(key, shape, window, "normal", dtype, bound)
    return z if (mean, std) == (0.0, 1.0) else z * std + mean


def randint(key: Tensor, shape: tuple[int, ...], *, low: int, high: int, window: Window | None = None) -> Tensor:
    """Integers in [low, high), int64, of `shape` or of its `window`; at most 2**32 different ones.

    `key`: int64 `[2]`. A 32-bit word is multiplied by the count and shifted down, so probabilities differ by at most
    `(high - low) / 2**32` relative to one another. ValueError for an empty or too wide range, a key of another dtype or
    shape, a negative size, or a window outside of the shape.

    >>> import ftrain
    >>> dice = ftrain.randint(ftrain.key(0), (100,), low=1, high=7)
    >>> sorted(set(dice.tolist()))
    [1, 2, 3, 4, 5, 6]
    """
    count = high - low
    if not 0 < count <= 1 << 32:
        raise ValueError(f"randint: [{low}, {high}) has {count} integers, must have 1 to 2**32")
    return low + ((bits(key, shape, window=window) * count >> 32) & MASK)


def bernoulli(key: Tensor, shape: tuple[int, ...], *, p: float | Tensor, window: Window | None = None) -> Tensor:
    """Bools of `shape`, or of its `window`, each True with probability `p`, to 2**-32.

    `key`: int64 `[2]`. `p`: a float, or a floating tensor that broadcasts to the result. ValueError for a key of
    another dtype or shape, a negative size, or a window outside of the shape.

    >>> import ftrain
    >>> keep = ftrain.bernoulli(ftrain.key(0), (1000,), p=0.9)
    >>> keep.dtype, 860 < int(keep.sum()) < 940
    (torch.bool, True)
    """
    threshold = (p.double() if isinstance(p, Tensor) else p) * 2.0**32
    return bits(key, shape, window=window) < threshold


def categorical(key: Tensor, logits: Tensor, dim: int = -1) -> Tensor:
    """An index along `dim` for each row of unnormalised log probabilities: int64, of the shape of `logits` without
    `dim`.

    `key`: int64 `[2]`. `logits`: floating, any shape; an index whose logit is minus infinity is never drawn while
    another is finite. The Gumbel-max trick in float32. ValueError for a key of another dtype or shape.

    >>> import torch
    >>> import ftrain
    >>> ftrain.categorical(ftrain.key(0), torch.tensor([[0.0, float("-inf")], [float("-inf"), 0.0]]))
    tensor([0, 1])
    """
    u = (bits(key, tuple(logits.shape)).float() + 0.5) * 2.0**-32
    gumbel = -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))
    return (logits.float() + gumbel).argmax(dim)


def permutation(key: Tensor, n: int) -> Tensor:
    """A random order of `range(n)`, int64 `[n]`, on the device of the key: the order of n 64-bit numbers.

    `key`: int64 `[2]`; ValueError for another dtype or shape, and for a negative `n`.

    >>> import ftrain
    >>> sorted(ftrain.permutation(ftrain.key(0), 5).tolist())
    [0, 1, 2, 3, 4]
    """
    high, low = bits(key, (n, 2)).unbind(-1)
    return torch.argsort((high << 32) | low, stable=True)


def _draw(
    key: Tensor, shape: tuple[int, ...], window: Window | None, kind: str, dtype: torch.dtype, bound: float = 0.0
) -> Tensor:
    """The numbers of `shape` or of its window; `bound` 0 is a whole normal."""
    _check_key(key)
    if kind != "bits" and dtype not in UNIFORM_BITS:
        raise ValueError(f"random {kind} numbers have no dtype {dtype}, only {[str(d) for d in UNIFORM_BITS]}")
    shape = tuple(shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"random numbers have no shape {shape}: sizes are 0 or more")
    size = shape if window is None else tuple(window.size)
    base = None if window is None else _first_index(shape, window, key.device)
    return philox_numbers(key, base, shape, size, kind, dtype, bound)


def _first_index(shape: tuple[int, ...], window: Window, device: torch.device) -> Tensor:
    """The global row-major index of the window's first element, 0-d."""
    if not len(window.start) == len(window.size) == len(shape):
        raise ValueError(f"window {window} must have one start and one size for each dim of {shape}")
    base = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for start, size, whole in zip(reversed(window.start), reversed(window.size), reversed(shape), strict=True):
        if size > whole or (isinstance(start, int) and not 0 <= start <= whole - size):
            raise ValueError(f"window of {size} from {start} does not lie in a dim of {whole} (shape {shape})")
        if not isinstance(start, int) or start:
            base = base + start * stride
        stride *= whole
    return base


def _check_key(key: Tensor) -> None:
    if key.dtype != torch.int64 or tuple(key.shape) != (2,):
        raise ValueError(f"a random key is int64 [2], got {key.dtype} {list(key.shape)}; make one with key(seed)")
