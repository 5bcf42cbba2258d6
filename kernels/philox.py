"""Philox4x32-10: random words from a counter and a key, and numbers from words, in plain int64 tensor operations.

Every device, eager or traced, and every layout of a mesh sees equal bits. The generator is that of Salmon, Moraes, Dror
and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. `ftrain.kernels.random` is what users call.

Legend: R runs (contiguous pieces of the global index), L numbers per run.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ftrain.kernels.backend import inside_higher_transform
from ftrain.kernels.opaque import opaque_op

Word: TypeAlias = Tensor | int

MASK = 0xFFFFFFFF
"""The 32 bits of a word."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# The last counter word tells the uses of one key apart: numbers, fold_in and split never share a block.
NUMBERS, FOLD, SPLIT = 0, 1, 2

# Words per pass: the int64 temporaries of one pass (about ten of a quarter of this) stay in a CPU's cache.
_CPU_CHUNK = 1 << 16
_GPU_CHUNK = 1 << 22

# How many leading bits of a 32-bit word a uniform number keeps: those its significand holds, so that it never rounds
# up to 1. float64 joins two words.
UNIFORM_BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, torch.float64: 53}


def philox_words(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10: four random 32-bit words for each counter, of the shape that counters and keys broadcast to.

    `counter` and `key`: 32-bit words held in int64 tensors of any shapes that broadcast, or Python ints.

    >>> from ftrain.kernels.philox import philox_words
    >>> [f"{word:08x}" for word in philox_words((0, 0, 0, 0), (0, 0))]  # a vector of the Random123 distribution
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap into the sign bit, which the masks below take off again.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) ^ c1 ^ k0) & MASK, ((p0 >> 32) ^ c3 ^ k1) & MASK
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def philox_key(key: Tensor, data: Tensor, tag: int) -> Tensor:
    """New keys, int64 `[..., 2]`, for each number of `data` (int64 `[...]`) under a key int64 `[2]`.

    `tag`: FOLD or SPLIT; keys of different tags never meet, nor do they meet NUMBERS.
    """
    return _derived_key(key, data, tag) if inside_higher_transform() else _philox_key(key, data, tag)


def _derived_key(key: Tensor, data: Tensor, tag: int) -> Tensor:
    words = philox_words((data & MASK, (data >> 32) & MASK, 0, tag), (key[0], key[1]))
    return torch.stack([words[0], words[1]], dim=-1)  # type: ignore[list-item]


def _derived_key_op(key: Tensor, data: Tensor, tag: int) -> Tensor:
    """`_derived_key`, in Python ints where that is cheaper than a hundred operations on tiny tensors."""
    if key.device.type != "cpu" or data.numel() > 16:
        return _derived_key(key, data, tag)
    k0, k1 = key.tolist()
    rows = [philox_words((d & MASK, (d >> 32) & MASK, 0, tag), (k0, k1))[:2] for d in data.flatten().tolist()]
    return torch.tensor(rows, dtype=torch.int64).reshape(*data.shape, 2)


def philox_numbers(
    key: Tensor,
    base: Tensor | None,
    shape: tuple[int, ...],
    size: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    bound: float,
) -> Tensor:
    """The numbers of the window of `size` that begins at global index `base`, of an array of `shape`; of shape `size`.

    - `key`: int64 `[2]`. `base`: 0-d int64, None for the start of the array.
    - `kind`: "bits", "uniform" in [0, 1), or "normal" of mean 0 and deviation 1.
    - `dtype`: of the result; one of UNIFORM_BITS, for "bits" int64.
    - `bound`: cuts a normal off, in standard deviations; 0 is a whole normal.

    One opaque op, and plain torch under `vmap`, `jvp` and nested `grad`.
    """
    generate = _generate if inside_higher_transform() else _philox
    return generate(key, base, shape, size, kind, dtype, bound)


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
    return numbers_of_words(words_RL, kind, dtype, bound).reshape(size)


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
            into.copy_(
                numbers_of_words(_piece(key_words, first, into.shape[1] * per, base is None), kind, dtype, bound)
            )
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
    words = philox_words((counter & MASK, counter >> 32, 0, NUMBERS), key)
    words_RN = torch.stack(words, dim=-1).flatten(-2)  # type: ignore[arg-type]
    if aligned:
        return words_RN[..., :length]
    return words_RN.gather(-1, (first_R1 & 3) + torch.arange(length, device=device))


def numbers_of_words(words_RL: Tensor, kind: str, dtype: torch.dtype, bound: float) -> Tensor:
    """Numbers of a kind and dtype from 32-bit words int64 `[R, L]`, elementwise; for float64 two words make one number.

    `kind`, `bound`: as in `philox_numbers`.
    """
    if kind == "bits":
        return words_RL
    if dtype == torch.float64:
        high, low = words_RL.unflatten(-1, (-1, 2)).unbind(-1)
        words_RL, width = (high << 21) | (low >> 11), 53
    else:
        width = 32
    if kind == "uniform":
        keep = UNIFORM_BITS[dtype]
        return (words_RL >> (width - keep)).to(dtype) * 2.0**-keep
    # Odd multiples of 2**-b in (-1, 1): exact in float64, symmetric, and never an end of the interval.
    width = min(width, 52)
    odd = (words_RL >> 1 if dtype == torch.float64 else words_RL) * 2 + 1 - (1 << width)
    x = odd.double() * (2.0**-width * (math.erf(bound / math.sqrt(2)) if bound else 1.0))
    z = torch.erfinv(x) * math.sqrt(2)
    return (z.clamp(-bound, bound) if bound else z).to(dtype)


def _philox_fake(key: Tensor, base: Any, shape: Any, size: Any, kind: Any, dtype: Any, bound: Any) -> Tensor:
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
