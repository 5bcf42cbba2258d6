"""Loops over the experts that got tokens: which ones did is data, so a traced step goes over all of them.

Some of transformers' experts do not ask its registry. They find the experts that got a token, `hit.nonzero()`, and for
each of these the tokens, compute them, and add them to the result. An expert without tokens adds nothing.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ftrain.graph.source import user_source

_MARK = "ftrain_every_expert"
MOST = 64
"""Experts of a loop that a traced step holds."""
_LOOP = (Tensor.dim, Tensor.unbind)


class EveryExpert(TorchFunctionMode):
    """Within the block a loop over `hit.nonzero()`, `hit` bool `[E]`, in a module named Experts is over all `E`.

    ValueError, with the line, for another use of these indices, whose number is not that of the experts that got
    tokens, and of a number of tokens that is more than a question whether there are any.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.nonzero, torch.nonzero) and args[0].dim() == 1 and (experts := _experts()) is not None:
            known = getattr(experts, "num_experts", len(args[0]))  # one index more is that of no expert
            every_E1 = torch.arange(min(len(args[0]), known), device=args[0].device)[:, None]
            if len(every_E1) > MOST:
                raise ValueError(
                    f"{user_source()}: {type(experts).__name__} is a loop over {len(every_E1)} experts, and a traced "
                    f"step would hold its body as often: a model of this kind is bridged with at most {MOST} experts"
                )
            setattr(every_E1, _MARK, True)
            return every_E1
        if args and hasattr(args[0], _MARK):
            if func not in _LOOP:
                raise ValueError(f"{user_source()}: experts that got tokens are counted, not only gone over in a loop")
            if func is Tensor.unbind:
                return tuple(torch.tensor([i], device=args[0].device) for i in range(len(args[0])))
        found = func(*args, **kwargs)
        if func is Tensor.numel and isinstance(found, torch.SymInt) and _experts() is not None:
            return _Some()
        return found


class _Some:
    """How many tokens an expert got, which is asked only to pass over one that got none: it is computed with none."""

    def __eq__(self, other: object) -> bool:
        if other != 0:
            raise ValueError(f"{user_source()}: how many tokens an expert got is data, and compared with {other!r}")
        return False

    __hash__ = None  # type: ignore[assignment]


def _experts() -> nn.Module | None:
    """The module that runs, if it is named Experts."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return module if type(module).__name__.endswith("Experts") else None
        frame = frame.f_back
    return None
