"""What tells weights from others, without reading all of them."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ftrain.hf.files import HfFolder, opened

_BLOCKS, _BLOCK = 16, 256  # of each tensor: few pages of a file of many gigabytes


def weights_digest(held: HfFolder, told: Mapping[str, Any], names: Iterable[str]) -> str:
    """A digest of what is `told` of a model, without versions and private entries, and of each tensor of these names
    its name, shape, dtype and 4,096 bytes in 16 blocks spread over it. ValueError for a damaged file.
    """
    found = hashlib.sha256()
    settled = {name: value for name, value in told.items() if not name.startswith("_") and "version" not in name}
    found.update(repr(sorted(settled.items())).encode())
    for name in sorted(names):
        stored = held.tensors[name]
        found.update(f"{name} {stored.shape} {stored.dtype}".encode())
        with opened(stored.file) as file:
            raw = file.get_tensor(name).reshape(-1).view(torch.uint8)
        step = max(_BLOCK, len(raw) // _BLOCKS)
        for start in range(0, len(raw), step):
            found.update(raw[start : start + _BLOCK].numpy().tobytes())
    return found.hexdigest()
