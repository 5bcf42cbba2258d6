"""Codebooks that are averages of the rows which choose their entries (van den Oord et al. 2017, appendix A).

They are a *state*, which a step moves on (`moved`) and no gradient reaches: of each entry the averaged sum of its rows,
and how many they were.

Legend: R rows, Z width, Q levels, K entries of a level.
"""

import torch
from torch import Tensor

from ftrain.kernels.mean import sum_over_batch
from ftrain.modules.codebook import Quantized, drawn_seats
from ftrain.modules.spec import ParamSpec, Tree, fan_in, ones

LEAST = 1e-5
"""An entry that fewer rows have chosen, on average, is divided by this number."""


def state_specs(levels: int, entries: int, width: int) -> dict[str, ParamSpec]:
    """`embed_sum_QKZ` and `cluster_usage_QK`: the sums, and how many rows they are of."""
    axes = (None, "codebook", "code_dim")
    return {
        "cluster_usage_QK": ParamSpec((levels, entries), axes[:2], ones()),
        "embed_sum_QKZ": ParamSpec((levels, entries, width), axes, fan_in(width)),
    }


def begun(books_QKZ: Tensor) -> Tree:
    """The state of codebooks of which each entry was chosen once, by itself; float32."""
    return {
        "cluster_usage_QK": torch.ones_like(books_QKZ[..., 0], dtype=torch.float32),
        "embed_sum_QKZ": books_QKZ.detach().float().clone(),
    }


def books(state: Tree) -> Tensor:
    """The codebooks `[Q, K, Z]` of a state.

    >>> state = {"embed_sum_QKZ": torch.full((1, 1, 2), 6.0), "cluster_usage_QK": torch.tensor([[2.0]])}
    >>> books(state).tolist()
    [[[3.0, 3.0]]]
    """
    found: Tensor = state["embed_sum_QKZ"] / state["cluster_usage_QK"].clamp(min=LEAST)[..., None]
    return found


def moved(state: Tree, found: Quantized, counted_R: Tensor | None = None, *, decay: float = 0.99) -> Tree:
    """The state after a step, of the whole batch's rows that count (bool `[R]`; None: all), on every rank alike. No
    gradient.

    `decay`: what is kept of the averages, of each step's `1 - decay` is added.
    """
    usage_QK, sum_QKZ = state["cluster_usage_QK"], state["embed_sum_QKZ"]
    # A product with what was chosen, not a scatter: it is summed in a fixed order.
    entries_K = torch.arange(usage_QK.shape[1], device=usage_QK.device)
    chosen_QRK = found.codes_QR[..., None] == entries_K
    if counted_R is not None:
        chosen_QRK = chosen_QRK & counted_R[:, None]
    chosen_QRK = chosen_QRK.to(sum_QKZ.dtype)
    rows_QRZ = found.left_QRZ.detach().to(sum_QKZ.dtype)
    counts_QK, sums_QKZ = sum_over_batch(chosen_QRK.sum(1)), sum_over_batch(chosen_QRK.mT @ rows_QRZ)
    return {
        **state,
        "cluster_usage_QK": usage_QK * decay + counts_QK * (1 - decay),
        "embed_sum_QKZ": sum_QKZ * decay + sums_QKZ * (1 - decay),
    }


def revived(state: Tree, rows_QRZ: Tensor, *, key: Tensor, least: float = 0.1) -> Tree:
    """The state with every entry used less than `least` times on average set upon a row of its level, drawn by the key
    (int64 `[2]`), as if one row had chosen it.

    A pure function for between steps, with rows that were quantized (`Quantized.left_QRZ`): Dhariwal et al. 2020.
    """
    usage_QK, sum_QKZ = state["cluster_usage_QK"], state["embed_sum_QKZ"]
    seats_QKZ, dead_QK = drawn_seats(rows_QRZ, usage_QK.shape[1], key=key).to(sum_QKZ.dtype), usage_QK < least
    return {
        **state,
        "cluster_usage_QK": torch.where(dead_QK, 1, usage_QK),
        "embed_sum_QKZ": torch.where(dead_QK[..., None], seats_QKZ, sum_QKZ),
    }
