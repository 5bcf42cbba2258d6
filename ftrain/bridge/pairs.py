"""Whether several sources and targets may share a pack of an encoder-decoder: as for one pack, in three parts.

The encoder keeps tokens of the source apart, the decoder those of the target, and what the decoder makes of the
encoder's result (keys and values) keeps those of the source apart. Between them stands attention, which knows of
documents. Numbers that a model adds to scores may depend on the distance between two tokens alone (`relative.py`).

Legend: S tokens of the source, T of the target; in the proof they are of different number. H heads, K, V dims of one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ftrain.bridge.attention import Weighed, weighing
from ftrain.bridge.proof import TOKENS, mixing, packed
from ftrain.bridge.relative import by_distance
from ftrain.bridge.seq2seq import Seq2Seq

_OTHER = 29  # tokens of the side that is not looked at
_PLACES = {"tokens": "positions", "source": "source_positions"}


def apart(made: Seq2Seq, params: Any) -> str:
    """Why documents cannot share a pack of sources and one of targets, in words; empty if they can.

    `params`: the model's, without memory.
    """
    parts = (("source", _encoded), ("tokens", _written), ("source", _read))
    for side, part in parts:
        why = mixing(packed(_on(made, side, part), params, _rows(side)))
        if why:
            return why
    return by_distance(lambda p: made.result(p, {**_rows("tokens"), **_constants("source")}), params)


def _on(made: Seq2Seq, side: str, part: Callable[..., Tensor]) -> Callable[[Any, Mapping[str, Tensor]], Tensor]:
    """A function of the parameters and of one side's rows; the other side is constant."""
    other = "tokens" if side == "source" else "source"
    return lambda params, batch: part(made, params, {**batch, **_constants(other)})


def _rows(side: str) -> dict[str, Tensor]:
    zeros = torch.zeros(TOKENS, dtype=torch.int64)
    return {side: zeros + 5, _PLACES[side]: torch.arange(TOKENS)}


def _constants(side: str) -> dict[str, Tensor]:
    return {side: torch.full((_OTHER,), 5), _PLACES[side]: torch.arange(_OTHER)}


def _encoded(made: Seq2Seq, params: Any, batch: Mapping[str, Any]) -> Tensor:
    with weighing(_alone):
        found: Tensor = made.result(params, batch)[0].encoder_last_hidden_state
    return found


def _written(made: Seq2Seq, params: Any, batch: Mapping[str, Any]) -> Tensor:
    with weighing(_alone):
        return made.logits(params, batch)


def _read(made: Seq2Seq, params: Any, batch: Mapping[str, Any]) -> Tensor:
    """What the decoder reads of the source: sums of its keys and values."""
    found: list[Tensor] = []

    def noted(weighed: Weighed) -> Tensor:
        if _across(weighed):
            found.extend((weighed.key.sum((1, 3)), weighed.value.sum((1, 3))))
        return _alone(weighed)

    with weighing(noted):
        made.result(params, batch)
    return torch.stack(found)


def _across(weighed: Weighed) -> bool:
    return weighed.query.shape[2] != weighed.key.shape[2]


def _alone(weighed: Weighed) -> Tensor:
    """Ops of single tokens in the place of attention; of one that reads the other side, ops of the queries."""
    if weighed.rule.dense is not None:
        raise ValueError(f"the mask of {type(weighed.module).__name__} is no rule of distances")
    width = weighed.value.shape[-1]
    out = weighed.query.sum(-1, keepdim=True).transpose(1, 2).expand(-1, -1, -1, width)
    if weighed.bias is not None:
        out = out + weighed.bias.sum()
    if _across(weighed):
        return out
    return out + weighed.key.sum((1, 3))[:, :, None, None] + weighed.value.sum(1)[:, :, None]
