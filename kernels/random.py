"""Counter-based random numbers: a number depends on its key and its index alone.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
in plain int64 tensor operations, so that every device, eager or traced, and every layout of the mesh sees equal bits.
A key is an int64 tensor `[2]` of two 32-bit words. Number `i` of a row-major `shape` is word `i % 4` of the block whose
counter is `i // 4` (float64 numbers take words `2i` and `2i + 1`).

Legend: R runs (contiguous pieces of the global index), L numbers per run.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ftrain.kernels.backend import inside_higher_transform
from ftrain.kernels.opaque import opaque_op

Word: TypeAlias = Tensor | int

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# The last counter word tells the uses of one key apart: numbers, fold_in and split never share a block.
_NUMBERS, _FOLD, _SPLIT = 0, 1, 2

# Words per pass: the int64 temporaries of one pass (about ten of a quarter of this) stay in a CPU's cache.
_CPU_CHUNK = 1 << 16
_GPU_CHUNK = 1 << 22

# How many leading bits of a 32-bit word a uniform number keeps: those its significand holds, so that it never rounds
# up to 1. float64 joins two words.
_UNIFORM_BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, torch.float64: 53}


class Window(NamedTuple):
    """A slice of a global array: the index of its first element and its sizes, one of each per dim.

    A start is an int or a 0-d int64 tensor (a rank's coordinate is an input of a graph, not a constant); only ints are
    checked against the global shape.
    """

    start: tuple[int | Tensor, ...]
    size: tuple[int, ...]


def philox_words(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10: four random 32-bit words for each counter.

    `counter` and `key` are 32-bit words held in int64 tensors of any shapes that broadcast, or Python ints.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap into the sign bit, which the masks below take off again.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, ((p0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def key(seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """The key of a seed, int64 `[2]`. Seeds are 64-bit: -2**63 <= seed < 2**64, else ValueError."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"a seed is a whole number, not {seed!r}")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed {seed} does not fit in 64 bits")
    words = [torch.full((1,), (seed >> shift) & _MASK, dtype=torch.int64, device=device) for shift in (0, 32)]
    return torch.cat(words)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key for `(key, data)`, e.g. for a step or a layer: `[2]`, or `[..., 2]` for an int64 tensor of data."""
    _check_key(key)
    if isinstance(data, int):
        if not -(1 << 63) <= data < 1 << 63:
            raise ValueError(f"fold_in: {data} does not fit in int64")
        data = torch.full((), data, dtype=torch.int64, device=key.device)
    return _derive(key, data, _FOLD)


def split(key: Tensor, n: int = 2) -> Tensor:
    """`n` new keys, `[n, 2]`; row `i` does not depend on `n`. ValueError for less than none."""
    _check_key(key)
    if n < 0:
        raise ValueError(f"split: there are no {n} keys; ask for 0 or more")
    return _derive(key, torch.arange(n, device=key.device), _SPLIT)


def bits(key: Tensor, shape: tuple[int, ...], *, window: Window | None = None) -> Tensor:
    """Random 32-bit words as int64 in [0, 2**32), of `shape` or of its `window`."""
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
    """Uniform numbers in [low, high): multiples of `(high - low) * 2**-b`, b the bits of the dtype's significand."""
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
    """Normal numbers by the inverse distribution function of one 32-bit word (float64: of 52 bits).

    The function is evaluated at the middle of each of the 2**32 (2**52) steps, so the numbers are symmetric and always
    finite: the largest is 6.3 (8.2) standard deviations.
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
    """Normal numbers conditioned on lying within `bound` standard deviations of the mean.

    `std` is that of the normal before truncation, as in `torch.nn.init.trunc_normal_`; with `bound=2` the numbers
    themselves have 0.88 of it.
    """
    if not bound > 0:
        raise ValueError(f"truncated_normal: bound={bound} must be positive (in standard deviations)")
    z = _draw(key, shape, window, "normal", dtype, bound)
    return z if (mean, std) == (0.0, 1.0) else z * std + mean


def randint(key: Tensor, shape: tuple[int, ...], *, low: int, high: int, window: Window | None = None) -> Tensor:
    """Integers in [low, high), int64, at most 2**32 of them.

    A 32-bit word is multiplied by the count and shifted down, so probabilities differ by at most `(high - low) / 2**32`
    relative to one another.
    """
    count = high - low
    if not 0 < count <= 1 << 32:
        raise ValueError(f"randint: [{low}, {high}) has {count} integers, must have 1 to 2**32")
    return low + ((bits(key, shape, window=window) * count >> 32) & _MASK)


def bernoulli(key: Tensor, shape: tuple[int, ...], *, p: float | Tensor, window: Window | None = None) -> Tensor:
    """True with probability `p`, to 2**-32; a tensor `p` broadcasts to the result."""
    threshold = (p.double() if isinstance(p, Tensor) else p) * 2.0**32
    return bits(key, shape, window=window) < threshold


def categorical(key: Tensor, logits: Tensor, dim: int = -1) -> Tensor:
    """An index along `dim` for each row of unnormalised log probabilities, int64, by the Gumbel-max trick.

    An index whose logit is minus infinity is never drawn while another is finite.
    """
    u = (bits(key, tuple(logits.shape)).float() + 0.5) * 2.0**-32
    gumbel = -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))
    return (logits.float() + gumbel).argmax(dim)


def permutation(key: Tensor, n: int) -> Tensor:
    """A random order of `range(n)`, int64 `[n]`: the order of n 64-bit numbers."""
    high, low = bits(key, (n, 2)).unbind(-1)
    return torch.argsort((high << 32) | low, stable=True)


def _draw(
    key: Tensor, shape: tuple[int, ...], window: Window | None, kind: str, dtype: torch.dtype, bound: float = 0.0
) -> Tensor:
    """The numbers of `shape` or of its window; `bound` 0 is a whole normal."""
    _check_key(key)
    if kind != "bits" and dtype not in _UNIFORM_BITS:
        raise ValueError(f"random {kind} numbers have no dtype {dtype}, only {[str(d) for d in _UNIFORM_BITS]}")
    shape = tuple(shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"random numbers have no shape {shape}: sizes are 0 or more")
    size = shape if window is None else tuple(window.size)
    base = None if window is None else _first_index(shape, window, key.device)
    if inside_higher_transform():
        return _generate(key, base, shape, size, kind, dtype, bound)
    return _philox(key, base, shape, size, kind, dtype, bound)


def _first_index(shape: tuple[int, ...], window: Window, device: torch.device) -> Tensor:
    """The global row-major index of the window's first element, 0-d."""
    if not len(window.start) == len(window.size) == len(shape):
        raise ValueError(f"window {window} has not one start and one size for each dim of {shape}")
    base = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for start, size, whole in zip(reversed(window.start), reversed(window.size), reversed(shape), strict=True):
        if size > whole or (isinstance(start, int) and not 0 <= start <= whole - size):
            raise ValueError(f"window of {size} from {start} does not lie in a dim of {whole} (shape {shape})")
        if not isinstance(start, int) or start:
            base = base + start * stride
        stride *= whole
    return base


def _derive(key: Tensor, data: Tensor, tag: int) -> Tensor:
    return _derived_key(key, data, tag) if inside_higher_transform() else _philox_key(key, data, tag)


def _derived_key(key: Tensor, data: Tensor, tag: int) -> Tensor:
    words = philox_words((data & _MASK, (data >> 32) & _MASK, 0, tag), (key[0], key[1]))
    return torch.stack([words[0], words[1]], dim=-1)  # type: ignore[list-item]


def _derived_key_op(key: Tensor, data: Tensor, tag: int) -> Tensor:
    """`_derived_key`, in Python ints where that is cheaper than a hundred operations on tiny tensors."""
    if key.device.type != "cpu" or data.numel() > 16:
        return _derived_key(key, data, tag)
    k0, k1 = key.tolist()
    rows = [philox_words((d & _MASK, (d >> 32) & _MASK, 0, tag), (k0, k1))[:2] for d in data.flatten().tolist()]
    return torch.tensor(rows, dtype=torch.int64).reshape(*data.shape, 2)


def _check_key(key: Tensor) -> None:
    if key.dtype != torch.int64 or tuple(key.shape) != (2,):
        raise ValueError(f"a random key is int64 [2], got {key.dtype} {list(key.shape)}; make one with key(seed)")


def _generate(
    key: Tensor,
    base: Tensor | None,
    shape: tuple[int, ...],
    size: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    bound: float,
) -> Tensor:
    """All numbers of the window of `size` that begins at global index `base`, in one pass."""
    run, offset_R = _runs(shape, size, key.device)
    per = _words_per_number(dtype)
    first_R1 = _first_words(base, offset_R, per)
    words_RL = _piece((key[0], key[1]), first_R1, run * per, base is None)
    return _numbers(words_RL, kind, dtype, bound).reshape(size)


def _generate_in_chunks(
    key: Tensor,
    base: Tensor | None,
    shape: tuple[int, ...],
    size: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    bound: float,
) -> Tensor:
    """`_generate` in passes whose temporaries stay in cache (on a GPU: in a bounded workspace)."""
    out = torch.empty(size, dtype=dtype, device=key.device)
    if out.numel() == 0:
        return out
    run, offset_R = _runs(shape, size, key.device)
    per = _words_per_number(dtype)
    first_R1 = _first_words(base, offset_R, per)
    out_RL = out.view(-1, run)
    # On a CPU the key as Python ints saves two fifths of the small operations; on a GPU it would make the host wait.
    key_words = tuple(key.tolist()) if key.device.type == "cpu" else (key[0], key[1])
    chunk = (_CPU_CHUNK if key.device.type == "cpu" else _GPU_CHUNK) // per
    rows = max(1, chunk // run)
    for r in range(0, out_RL.shape[0], rows):
        for c in range(0, run, chunk):
            into = out_RL[r : r + rows, c : c + chunk]
            first = first_R1[r : r + rows] + c * per
            into.copy_(_numbers(_piece(key_words, first, into.shape[1] * per, base is None), kind, dtype, bound))
    return out


def _runs(shape: tuple[int, ...], size: tuple[int, ...], device: torch.device) -> tuple[int, Tensor]:
    """A window as contiguous runs of the global index: their common length, and the offset of each from the first."""
    dim, run, stride = len(shape), 1, 1
    while dim > 0:
        dim -= 1
        run *= size[dim]
        stride *= shape[dim]
        if size[dim] != shape[dim]:
            break
    offset_R = torch.zeros(1, dtype=torch.int64, device=device)
    for d in reversed(range(dim)):
        offset_R = (torch.arange(size[d], device=device)[:, None] * stride + offset_R).reshape(-1)
        stride *= shape[d]
    return run, offset_R


def _first_words(base: Tensor | None, offset_R: Tensor, per: int) -> Tensor:
    first_R = offset_R if base is None else offset_R + base
    return (first_R * per)[:, None]


def _words_per_number(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.float64 else 1


def _piece(key: tuple[Word, Word], first_R1: Tensor, length: int, aligned: bool) -> Tensor:
    """Words `first .. first + length` of each run, `[R, length]`; `aligned` when every first is a multiple of 4."""
    device = first_R1.device
    counter = (first_R1 >> 2) + torch.arange((length + 6) // 4, device=device)
    words = philox_words((counter & _MASK, counter >> 32, 0, _NUMBERS), key)
    words_RN = torch.stack(words, dim=-1).flatten(-2)  # type: ignore[arg-type]
    if aligned:
        return words_RN[..., :length]
    return words_RN.gather(-1, (first_R1 & 3) + torch.arange(length, device=device))


def _numbers(words_RL: Tensor, kind: str, dtype: torch.dtype, bound: float) -> Tensor:
    """Turn words into numbers of the kind and dtype, elementwise."""
    if kind == "bits":
        return words_RL
    if dtype == torch.float64:
        high, low = words_RL.unflatten(-1, (-1, 2)).unbind(-1)
        words_RL, width = (high << 21) | (low >> 11), 53
    else:
        width = 32
    if kind == "uniform":
        keep = _UNIFORM_BITS[dtype]
        return (words_RL >> (width - keep)).to(dtype) * 2.0**-keep
    # Odd multiples of 2**-b in (-1, 1): exact in float64, symmetric, and never an end of the interval.
    width = min(width, 52)
    odd = (words_RL >> 1 if dtype == torch.float64 else words_RL) * 2 + 1 - (1 << width)
    x = odd.double() * (2.0**-width * (math.erf(bound / math.sqrt(2)) if bound else 1.0))
    z = torch.erfinv(x) * math.sqrt(2)
    return (z.clamp(-bound, bound) if bound else z).to(dtype)


def _philox_fake(key, base, shape, size, kind, dtype, bound):
    return key.new_empty(size, dtype=dtype)


_philox = opaque_op(
    "philox(Tensor key, Tensor? base, SymInt[] shape, SymInt[] size, str kind, ScalarType dtype, float bound)"
    " -> Tensor",
    fake=_philox_fake,
)(_generate_in_chunks)

_philox_key = opaque_op(
    "philox_key(Tensor key, Tensor data, int tag) -> Tensor",
    fake=lambda key, data, tag: data.new_empty((*data.shape, 2)),
)(_derived_key_op)


def _workspace(
    key: Tensor,
    base: Tensor | None,
    shape: tuple[int, ...],
    size: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    bound: float,
) -> int:
    """Bytes of one pass: per word 24 to generate, 10 to select, or 40 to turn it into a normal."""
    chunk = _CPU_CHUNK if key.device.type == "cpu" else _GPU_CHUNK
    words = math.prod(size) * _words_per_number(dtype)
    return min(words, chunk) * (40 if kind == "normal" else 24 if base is None else 34)


WORKSPACE: dict[str, Callable[..., int]] = {"ftrain::philox": _workspace}
