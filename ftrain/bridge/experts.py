"""The experts of transformers' modules, by its public registry: our primitive, with the module's own gate between.

Legend: T tokens, K experts per token, N = T * K rows, E experts, D model, F hidden of an expert.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ftrain.bridge.routers import record
from ftrain.kernels.embedding import embedding
from ftrain.kernels.experts import experts, experts_swiglu
from ftrain.kernels.grouped_mm import grouped_mm

_LEAVES = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}


def run_experts(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The experts function of transformers' registry: `[T, D]` in the dtype of the tokens.

    `module`: says how its weights lie (`has_gate`, `has_bias`, `is_transposed`, `is_concatenated`) and what stands
    between them (`_apply_gate`, `act_fn`).
    """
    made: Any = module
    record(module, index_TK)
    weights_TK = weights_TK.to(hidden_TD.dtype)
    up = made.gate_up_proj if made.has_gate else made.up_proj
    up, down = (w if made.is_transposed else w.transpose(1, 2) for w in (up, made.down_proj))
    if _is_swiglu(made):
        F = up.shape[2] // 2
        return experts_swiglu(hidden_TD, index_TK, weights_TK, up[..., :F], up[..., F:], down)
    biases = (_bias(made, "gate_up_proj" if made.has_gate else "up_proj"), _bias(made, "down_proj"))
    leaves = [up, down, *(b for b in biases if b is not None)]

    def network(rows_ND: Tensor, offsets_E: Tensor, expert_N: Tensor, own: tuple[Tensor, ...]) -> Tensor:
        inner = grouped_mm(rows_ND, own[0], offsets_E)
        inner = inner if len(own) == 2 else inner + embedding(expert_N, own[2])
        inner = made._apply_gate(inner) if made.has_gate else made.act_fn(inner)
        out_ND = grouped_mm(inner, own[1], offsets_E)
        out_ND = out_ND if len(own) == 2 else out_ND + embedding(expert_N, own[3])
        return made.post_expert_norm(out_ND) if getattr(made, "has_post_expert_norm", False) else out_ND

    return experts(hidden_TD, index_TK, weights_TK, leaves, network).to(hidden_TD.dtype)


def expert_leaves(module: nn.Module) -> set[str]:
    """The names of the parameters below `module` that `run_experts` reads, with an entry for each expert."""
    found = set()
    for path, inner in expert_modules(module):
        own = {name for name, _ in inner.named_parameters(recurse=False)}
        found |= {f"{path}.{name}" if path else name for name in own & _LEAVES}
    return found


def expert_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules within `module` that `run_experts` computes, with their paths."""
    for path, inner in module.named_modules():
        if all(hasattr(inner, flag) for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated")):
            yield path, inner


def _bias(module: Any, name: str) -> Tensor | None:
    return getattr(module, f"{name}_bias") if module.has_bias else None


def _is_swiglu(module: Any) -> bool:
    """True for experts that our fused primitive computes: SiLU, gate and up one after the other, no biases."""
    gate = getattr(type(module), "_apply_gate", None)
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    plain = module.has_gate and not module.has_bias and module.is_concatenated
    plain = plain and not getattr(module, "has_post_expert_norm", False)
    return bool(plain and silu and getattr(gate, "__name__", "") == "_default_apply_gate")
