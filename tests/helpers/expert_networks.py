"""Networks of experts for tests: one with all that a network may have, and those of transformers' modules."""

from collections.abc import Callable

import torch
from torch import Tensor

from ftrain.kernels.embedding import embedding
from ftrain.kernels.experts import FFN
from ftrain.kernels.grouped_mm import grouped_mm
from ftrain.kernels.rms_norm import rms_norm


def biased(scale_D: Tensor, *, backend: str = "auto") -> FFN:
    """Gate and up interleaved, clamped, biases, a norm with a captured scale after each expert; as gpt-oss and
    MuseSpark.

    Its leaves: `[E, D, 2F]`, `[E, 2F]`, and as rows of another layout `[E, D, F]` (applied transposed), `[E, D]`.
    """

    def ffn(rows_ND: Tensor, offsets_E: Tensor, expert_N: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
        w_in_EDF, b_in_EF, w_out_EDF, b_out_ED = leaves
        both_NF = grouped_mm(rows_ND, w_in_EDF, offsets_E, backend=backend)
        both_NF = both_NF + embedding(expert_N, b_in_EF, backend=backend)
        gate_NF, up_NF = both_NF[:, ::2].clamp(max=2.0), both_NF[:, 1::2].clamp(-2.0, 2.0)
        hidden_NF = (up_NF + 1) * gate_NF * torch.sigmoid(1.7 * gate_NF)
        out_ND = grouped_mm(hidden_NF, w_out_EDF.transpose(1, 2), offsets_E, backend=backend)
        out_ND = out_ND + embedding(expert_N, b_out_ED, backend=backend)
        return rms_norm(out_ND, scale_D, eps=1e-3, backend=backend)

    return ffn


def biased_shapes(E: int, D: int, F: int) -> tuple[tuple[int, ...], ...]:
    """Of the leaves of `biased`."""
    return (E, D, 2 * F), (E, 2 * F), (E, D, F), (E, D)


def biased_row(row_D: Tensor, leaves: list[Tensor], e: int, scale_D: Tensor) -> Tensor:
    """What expert `e` of `biased` makes of one row, from its definition."""
    w_in, b_in, w_out, b_out = (leaf[e] for leaf in leaves)
    both_F = row_D @ w_in + b_in
    gate_F, up_F = both_F[::2].clamp(max=2.0), both_F[1::2].clamp(-2.0, 2.0)
    out_D = w_out @ ((up_F + 1) * gate_F * torch.sigmoid(1.7 * gate_F)) + b_out
    return out_D * torch.rsqrt(out_D.square().mean() + 1e-3) * scale_D


def network_of(module: torch.nn.Module) -> tuple[list[str], Callable[..., Tensor]]:
    """The names of the leaves and the network of a module of transformers that `use_experts_implementation` marks."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = [first, "down_proj"]
    if module.has_bias:
        names += [f"{first}_bias", "down_proj_bias"]

    def ffn(rows_ND: Tensor, offsets_E: Tensor, expert_N: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
        given = dict(zip(names, leaves, strict=True))

        def linear(x: Tensor, name: str) -> Tensor:
            w = given[name] if module.is_transposed else given[name].transpose(1, 2)
            y = grouped_mm(x, w, offsets_E)
            return y + embedding(expert_N, given[f"{name}_bias"]) if module.has_bias else y

        hidden_NF = linear(rows_ND, first)
        hidden_NF = module._apply_gate(hidden_NF) if module.has_gate else module.act_fn(hidden_NF)
        out_ND = linear(hidden_NF, "down_proj")
        return module.post_expert_norm(out_ND) if module.has_post_expert_norm else out_ND

    return names, ffn
