"""Casts of weights: a number that the narrower dtype cannot hold is an error, never an infinity."""

import torch
from torch import Tensor


def require_in_range(values: Tensor, cast: Tensor, shown: str) -> None:
    """`ValueError` if `cast`, which is `values` in another dtype, is infinite where `values` is finite.

    Both have one shape, on any devices. `shown`: what an error calls the tensor.
    """
    if not (values.is_floating_point() and cast.is_floating_point()):
        return
    limit = torch.finfo(cast.dtype).max
    if limit >= torch.finfo(values.dtype).max:
        return
    infinite = cast.isinf()
    if not infinite.any():
        return
    lost = values[infinite.to(values.device)]
    lost = lost[lost.isfinite()]
    if lost.numel():
        raise ValueError(
            f"{shown} holds {lost[0].item():.6g}, which {cast.dtype} cannot hold (its largest number is {limit:.6g}): "
            "keep its dtype, or take bfloat16, whose range is nearly that of float32"
        )
