"""A configuration with fewer layers: models whose layers repeat are priced by a few of them."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

_LAYERS = "num_hidden_layers"


class Stack(NamedTuple):
    """`layers` of a model, which are alike in turns of `period`: layer i is of the kind of layer i + period."""

    layers: int
    period: int

    @property
    def turns(self) -> int:
        """How many whole turns there are."""
        return self.layers // self.period

    def at(self, turns: int) -> int:
        """The layers that a model with so many of the turns has; those that make no whole turn stay."""
        return self.layers - self.period * (self.turns - turns)


def stack_of(config: Any) -> Stack | None:
    """The layers of a configuration of transformers, by its lists of one entry a layer; None where it does not tell."""
    text = config.get_text_config(decoder=True)
    layers = getattr(text, _LAYERS, None)
    if not isinstance(layers, int) or layers < 2:
        return None
    lists = [value for value in vars(text).values() if isinstance(value, list) and len(value) == layers]
    period = next(p for p in range(1, layers + 1) if all(x[i] == x[i - p] for x in lists for i in range(p, layers)))
    return Stack(layers, period)


def with_layers(config: Any, layers: int) -> Any:
    """A copy of a configuration, of transformers or the mapping in `config.json`, with so many of its first layers."""
    if isinstance(config, Mapping):
        old = config.get(_LAYERS)
        return {**{name: _cut(value, old, layers) for name, value in config.items()}, _LAYERS: layers}
    made = copy.deepcopy(config)
    text = made.get_text_config(decoder=True)
    old = getattr(text, _LAYERS)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == old:
            setattr(text, name, _cut(value, old, layers))
    setattr(text, _LAYERS, layers)
    return made


def _cut(value: Any, old: Any, layers: int) -> Any:
    return value[:layers] if isinstance(value, list) and len(value) == old else value
