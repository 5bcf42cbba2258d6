"""Answer what reductions allocate beyond their results, beside what their rule says."""

from typing import Any

import torch
from on_null_device import say
from torch import Tensor

from ftrain.analysis.workspace_cuda import cuda_workspace

aten = torch.ops.aten
SHAPES = (
    *((1024, 128), (1024, 6, 128), (300, 64), (4096, 100), (5000, 33), (32768, 1536), (32768, 9216), (16384, 16)),
    *((1024,), (512, 4, 32), (40, 128), (200, 4096), (8, 100_000), (100_000, 8), (777, 6)),
)
REDUCTIONS = {
    "sum over 0": lambda x: (aten.sum.dim_IntList, (x, [0], True)),
    "mean over 0": lambda x: (aten.mean.dim, (x, [0])),
    "amax over 0": lambda x: (aten.amax.default, (x, [0])),
    "norm over 0": lambda x: (aten.linalg_vector_norm.default, (x, 2, [0])),
    "sum over -1": lambda x: (aten.sum.dim_IntList, (x, [-1])),
    "sum": lambda x: (aten.sum.default, (x,)),
}


def beyond_result(op: Any, arguments: tuple) -> int:
    """Bytes asked of the allocator at the most, less those of the result."""
    op(*arguments)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = op(*arguments)
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - result.nbytes


def compared(x: Tensor, words: str) -> list[tuple[str, int, int]]:
    """`(case, planned, measured)` of each reduction of `x`."""
    calls = {name: make(x) for name, make in REDUCTIONS.items()}
    return [
        (f"{name}, {words}", cuda_workspace(op, args, {}), beyond_result(op, args))
        for name, (op, args) in calls.items()
    ]


def compared_all(shape: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """Of both dtypes, of whole tensors and of half of their columns."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(shape, device="cuda", dtype=dtype)
        found += compared(x, f"{dtype}") + compared(x[..., : -(-shape[-1] // 2)], f"{dtype}, half of the columns")
    return found


if __name__ == "__main__":
    say({str(shape): compared_all(shape) for shape in SHAPES})
