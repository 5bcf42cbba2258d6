"""A hash of the bits of a tensor, computed where it lives."""

import torch
from torch import Tensor

# Odd numbers of splitmix64, as signed 64-bit integers: products wrap around.
_STRIDE = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_CHUNK = {"cpu": 2**16, "cuda": 2**22}  # words: small enough to stay in the cache of a core, large enough for a kernel


def hash_bits(tensor: Tensor) -> Tensor:
    """A 64-bit hash of the bits of a tensor of any shape and dtype: 0-d int64 on its device. Dtype and shape are no
    part of it.

    Each word of 64 bits is mixed with its index (splitmix64's finalizer), and the results are added, so that the order
    of the sum does not matter. One changed word always changes the hash; others collide once in 2^64. NaNs and the two
    zeros count by their bits. Extra memory: three chunks of at most 32 MiB.

    >>> import torch
    >>> from ftrain.sharding.bits import hash_bits
    >>> bool(hash_bits(torch.tensor([0.0])) == hash_bits(torch.tensor([-0.0])))
    False
    """
    words = _words(tensor.detach())
    chunk = _CHUNK.get(words.device.type, 2**20)
    place = torch.arange(min(chunk, words.numel()), device=words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for first in range(0, words.numel(), chunk):
        part = words[first : first + chunk]
        mixed = (place[: part.numel()] + first).mul_(_STRIDE).bitwise_xor_(part)
        for factor, shift in ((_FIRST, 32), (_SECOND, 29)):
            mixed ^= (mixed >> shift) & (2 ** (64 - shift) - 1)
            mixed *= factor
        total += (mixed ^ ((mixed >> 31) & (2**33 - 1))).sum()
    return total


def _words(tensor: Tensor) -> Tensor:
    """The bits as int64, the last word filled up with zeros."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    if whole == flat.numel() and flat.storage_offset() % 8 == 0:
        return flat.view(torch.int64)
    padded = flat.new_zeros(-(-flat.numel() // 8) * 8)
    padded[: flat.numel()] = flat
    return padded.view(torch.int64)
