"""A `Model` of transformers whose batch is rows: pictures and recordings."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftrain.bridge.attention import NAME
from ftrain.bridge.modules import Bridged, statistics
from ftrain.bridge.plain import plain_loss_of
from ftrain.bridge.rowwise import Rowwise
from ftrain.bridge.skeleton import buffers, build, nest, parameters
from ftrain.bridge.specs import beginnings, fix, inits_of, specs_of
from ftrain.bridge.weights import loader, saver, stored_buffers
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree

Make = Callable[..., nn.Module]
"""Gives a module of transformers: `make(dtype=, attention=, experts=)`."""


def rowwise_model(make: Make, task: str, dtype: torch.dtype, folder: Path | None) -> Model:
    """The model that `make` gives for one of `ftrain.bridge.rowwise.TASKS`. `folder`: of its weights, if there are any.

    ValueError for buffers of the folder that do not fit.
    """
    module = suited(partial(make, dtype=dtype))
    fix(module)
    held = {**buffers(module), **({} if folder is None else stored_buffers(module, folder))}
    specs = nest(specs_of(parameters(module), inits=inits_of(module, beginnings(module))))
    name, written = type(module).__name__, statistics(module)
    made = Rowwise(Bridged(module, name, held, written, inputs=lambda given: given), task)
    return Model(
        name=f"{name} of transformers",
        specs=specs,
        batch=made.leaves,
        loss=made.loss,
        logits=None if task == "features" else made.logits,
        hidden=made.hidden if task == "features" else None,
        load=loader(module, folder, specs),
        save=saver(module, held),
        state=nest({name: held[name] for name in written}),
        packs=False,
        alone="its batch is rows",
        plain=None if task == "features" else partial(_plain, make, made),
        why="bridged",
    )


def suited(make: Make) -> nn.Module:
    """The module without memory, with our attention where its own asks transformers' registry."""
    try:
        module = build(partial(make, attention=NAME))
    except KeyError as error:  # a table of its own of kinds of attention
        if error.args != (NAME,):
            raise
        return build(partial(make, attention="eager"))
    asks: Any = module._can_set_attn_implementation
    return module if asks() else build(partial(make, attention="eager"))


def _plain(make: Make, made: Rowwise, params: Tree, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    module = make(dtype=torch.float32, attention="eager", experts="eager")
    return plain_loss_of(module, made.plain, params, batch)
