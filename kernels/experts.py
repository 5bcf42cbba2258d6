"""Mixture of experts without dropping: each token's rows go through its experts' networks, group by group.

Legend: T tokens, K experts per token, N = T * K rows, E experts, D model, F hidden of an expert.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ftrain.kernels.grouped_mm import grouped_mm
from ftrain.kernels.moe import combine, moe_dispatch
from ftrain.kernels.primitive import primitive
from ftrain.kernels.stand_in import asks_stand_ins
from ftrain.kernels.swiglu import swiglu

FFN = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...]], Tensor]
"""The experts' network, as `experts` calls it: `ffn(rows_ND, offsets_E, expert_N, leaves)` to `[N, D]`."""


@asks_stand_ins
@primitive("experts")
def experts(
    x_TD: Tensor, expert_TK: Tensor, weights_TK: Tensor, leaves: Sequence[Tensor], ffn: FFN, *, backend: str = "auto"
) -> Tensor:
    """Each token's experts, of any network, weighted and summed: `[T, D]` in the dtype of the network's rows. Every
    token reaches all its experts.

    - `x_TD`: tokens.
    - `expert_TK`: integers in [0, E). `weights_TK`: floating, a weight for each choice.
    - `leaves`: the experts' tensors, at least one; the first dim of each counts the experts. They are differentiated.
    - `ffn(rows_ND, offsets_E, expert_N, leaves)`: a pure function to `[N, D]` (any D), called once. Its rows are sorted
      by expert: expert e has rows `offsets[e - 1] .. offsets[e]` (int32), and `expert_N` (int64) names each row's.
      `ftrain.kernels.grouped_mm.grouped_mm(rows_ND, w_EDF, offsets_E)` multiplies by weights;
      `ftrain.kernels.embedding.embedding(expert_N, b_EF)` is each row's bias, with a gradient that repeats to the bit.
      Tensors that it captures, a norm's scale for instance, are differentiated too.
    - `backend`: how rows are sorted and summed: "auto", "reference" or "sorted". The network chooses its own.

    A plan rebinds this primitive to run the experts on the ranks that hold them, where `leaves` are those of the rank's
    own experts, E and `expert_N` count these, N depends on the data, and with a static capacity there may be rows of
    zeros whose results nobody reads. `ffn` runs while a step is traced. ValueError for shapes, dtypes and backends that
    do not fit, and where `ffn` returns something else than N rows.

    >>> import torch
    >>> from ftrain.kernels.grouped_mm import grouped_mm
    >>> from ftrain.kernels.experts import experts
    >>> def ffn(rows_ND, offsets_E, expert_N, leaves):
    ...     return grouped_mm(rows_ND, leaves[0], offsets_E).relu()
    >>> w_EDF = torch.tensor([[[1.0]], [[10.0]]])
    >>> experts(torch.tensor([[1.0], [2.0]]), torch.tensor([[1], [0]]), torch.ones(2, 1), (w_EDF,), ffn).flatten()
    tensor([10.,  2.])
    """
    held = experts_held(leaves)
    rows_ND, dispatch = moe_dispatch(x_TD, expert_TK, num_experts=held, backend=backend)
    rows_ND = run_experts(rows_ND, dispatch.offsets_E, dispatch.expert_N, leaves, ffn)
    return combine(rows_ND, weights_TK, dispatch, backend=backend)


def experts_held(leaves: Sequence[Tensor]) -> int:
    """How many experts the leaves, `[E, ...]` each, are of. ValueError if there are none, or of different numbers."""
    held = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves}
    if len(held) != 1 or held == {0}:
        shapes = ", ".join(str([*leaf.shape]) for leaf in leaves) or "no leaf"
        raise ValueError(
            f"experts: the first dim of each leaf must count the experts, one number for all; got {shapes} (on a mesh "
            "that divides experts each leaf's ParamSpec must name that dim 'expert')"
        )
    return held.pop()


def run_experts(rows_ND: Tensor, offsets_E: Tensor, expert_N: Tensor, leaves: Sequence[Tensor], ffn: FFN) -> Tensor:
    """`ffn` of rows that are sorted by expert, `[N, D]`, with the arguments of `experts`; ValueError for other results.

    `offsets_E`: int32. `expert_N`: integers.
    """
    out_ND = ffn(rows_ND, offsets_E, expert_N.long(), tuple(leaves))
    if out_ND.dim() != 2 or out_ND.shape[0] != rows_ND.shape[0]:
        raise ValueError(
            f"experts: ffn must return [N, D], a row for each of the rows {[*rows_ND.shape]} that it was given, not "
            f"{[*out_ND.shape]}"
        )
    return out_ND


def experts_swiglu(
    x_TD: Tensor,
    expert_TK: Tensor,
    weights_TK: Tensor,
    w_gate_EDF: Tensor,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """`experts`, each a SwiGLU MLP: `[T, D]`.

    - `x_TD`: tokens, and three weights `[E, D, F]`, `[E, D, F]`, `[E, F, D]`, all of one floating dtype.
    - `expert_TK`: integers in [0, E). `weights_TK`: floating, a weight for each choice.
    - `backend`: "auto", "reference", or one of `grouped_mm`: "loop" or "grouped".

    ValueError for shapes, dtypes and backends that do not fit. Source: Shazeer et al., arXiv 1701.06538; without
    dropping as in Gale et al., arXiv 2211.15841.

    >>> import torch
    >>> from ftrain.kernels.experts import experts_swiglu
    >>> x_TD, one_EDF = torch.ones(2, 3), torch.ones(4, 3, 5)
    >>> y_TD = experts_swiglu(x_TD, torch.tensor([[0], [3]]), torch.ones(2, 1), one_EDF, one_EDF, torch.zeros(4, 5, 3))
    >>> y_TD.shape
    torch.Size([2, 3])
    """
    leaves, ffn = (w_gate_EDF, w_up_EDF, w_down_EFD), partial(swiglu_ffn, backend=backend)
    reference = "reference" if backend == "reference" else "auto"
    return experts(x_TD, expert_TK, weights_TK, leaves, ffn, backend=reference)


def swiglu_ffn(
    rows_ND: Tensor, offsets_E: Tensor, expert_N: Tensor, leaves: tuple[Tensor, ...], *, backend: str = "auto"
) -> Tensor:
    """The network of `experts_swiglu`, an `FFN`: `[N, D]`.

    `leaves`: weights `[E, D, F]`, `[E, D, F]`, `[E, F, D]`. `offsets_E`: int32. `expert_N` is not read. `backend`: as
    there.
    """
    w_gate_EDF, w_up_EDF, w_down_EFD = leaves
    gate_NF = grouped_mm(rows_ND, w_gate_EDF, offsets_E, backend=backend)
    up_NF = grouped_mm(rows_ND, w_up_EDF, offsets_E, backend=backend)
    hidden_NF = swiglu(gate_NF, up_NF, backend="reference" if backend == "reference" else "auto")
    return grouped_mm(hidden_NF, w_down_EFD, offsets_E, backend=backend)


@asks_stand_ins
@primitive("moe_dropped")
def dropped_rows(expert_TK: Tensor, w_gate_EDF: Tensor) -> Tensor:
    """How many of the T * K rows no expert computes, a float32 scalar: zero.

    A plan that gives these experts a static capacity rebinds this primitive to count what exceeds it.
    """
    return torch.zeros((), device=expert_TK.device)
