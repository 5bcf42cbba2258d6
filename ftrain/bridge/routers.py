"""What the routers of bridged models do: where they send tokens, and the biases that keep their load even.

A router is seen where its choice reaches our experts (`bridge/experts.py`). Its biases are those of loss-free balancing
(Wang et al. 2024): buffers, known by their names, that transformers' routers add to their scores for the choice alone.

Legend: T tokens, K experts per token, E experts.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ftrain.kernels.experts import dropped_rows
from ftrain.modules import moe
from ftrain.modules.moe import RouterLoad

_BIASES = ("e_score_correction_bias", "expert_bias")
"""What transformers calls the biases of a router's choice."""


@dataclass(frozen=True)
class _Seen:
    """The loads of one call by the path of the experts; `paths`: of modules, by their id."""

    paths: Mapping[int, str]
    loads: dict[str, RouterLoad] = field(default_factory=dict)


_seen: ContextVar[_Seen | None] = ContextVar("ftrain_bridge_routers", default=None)


@contextmanager
def counting(paths: Mapping[int, str]) -> Iterator[dict[str, RouterLoad]]:
    """Within the block what routers do is put into the dict that it gives, by the paths of their experts."""
    seen = _Seen(paths)
    token = _seen.set(seen)
    try:
        yield seen.loads
    finally:
        _seen.reset(token)


def record(module: nn.Module, index_TK: Tensor) -> None:
    """Count where tokens go that `module`, experts of transformers, is given; what runs several times is added up."""
    seen = _seen.get()
    if seen is None:
        return
    made: Any = module
    up = made.gate_up_proj if made.has_gate else made.up_proj
    found = moe.load_of(index_TK.detach(), _experts(module), dropped_rows(index_TK, up))
    path = seen.paths[id(module)]
    before = seen.loads.get(path)
    seen.loads[path] = found if before is None else RouterLoad(*(a + b for a, b in zip(before, found, strict=True)))


def biases_of(experts: Iterable[tuple[str, nn.Module]], held: Mapping[str, Tensor]) -> dict[str, str]:
    """By the path of experts the name of the biases of their router, among the buffers `held`, where it has some.

    `experts`: modules that our primitive computes, with their paths. A router lies beside its experts; biases that are
    no number for each expert are left out.
    """
    found = {}
    for path, module in experts:
        beside = f"{path.rpartition('.')[0]}."
        named = [name for name in held if name.startswith(beside) and name.rpartition(".")[2] in _BIASES]
        if len(named) == 1 and held[named[0]].numel() == _experts(module):
            found[path] = named[0]
    return found


def moved(biases: Mapping[str, Tensor], loads: Mapping[str, RouterLoad], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The biases after a step with these loads (`moe.update_bias`); those of a router that did not run stay.

    `names`: as `biases_of` gives them.
    """
    of = {name: loads[path].load_E for path, name in names.items() if path in loads}
    return {
        name: moe.update_bias(bias, of[name], rate=moe.BIAS_RATE) if name in of else bias
        for name, bias in biases.items()
    }


def _experts(module: Any) -> int:
    """How many experts there are on all ranks."""
    return int(module.num_experts)
