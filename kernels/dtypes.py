"""The dtype that a kernel computes in, whatever the dtype of its inputs."""

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: the dtype of sums, scores and statistics over inputs of `dtype`.

    >>> import torch
    >>> from ftrain.kernels.dtypes import accumulate_dtype
    >>> accumulate_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
