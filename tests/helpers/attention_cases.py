"""Packs for attention, and what the tests of its variants compare: the result and every gradient.

T tokens, S keys, H query heads, G key/value heads, K head dim, V head dim of values.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

ANY_PACK = {
    "lengths": st.lists(st.integers(1, 20), min_size=1, max_size=6),
    "heads": st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    "causal": st.booleans(),
    "window": st.none() | st.integers(1, 25),
    "seed": st.integers(0, 99),
}
"""Documents, heads `(H, G)` and masks, for hypothesis."""


def segments_of(lengths: Sequence[int]) -> Tensor:
    """The ids of documents of these lengths, int64 `[T]`."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def inputs(
    T: int,
    *,
    H: int = 4,
    G: int = 2,
    K: int = 4,
    V: int | None = None,
    S: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    grad: bool = True,
    sinks: bool = False,
) -> list[Tensor]:
    """Queries, keys and values, and with `sinks` a sink for each head."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(T, H, K), (S or T, G, K), (S or T, G, V or K), *([(H,)] if sinks else [])]
    return [torch.randn(s, generator=random, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def gradients(f: Callable[..., Tensor], tensors: Sequence[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """What attention makes of queries, keys, values and perhaps sinks, and the gradient of each."""
    sinks = {"sinks_H": tensors[3]} if len(tensors) > 3 else {}
    out = f(*tensors[:3], **sinks, **options)
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, tensors, seed)


def assert_close(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Results of `gradients` agree within an absolute and relative tolerance."""
    names = ("out", "dq", "dk", "dv", "dsinks")[: len(wanted)]
    for name, a, b in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
