"""A `Model` of transformers that reads pictures and sound among its tokens.

Legend: B rows, L tokens of a row.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ftrain.bridge.attention import NAME
from ftrain.bridge.experts import expert_leaves
from ftrain.bridge.media import Media, leaves
from ftrain.bridge.media_leaves import prepared
from ftrain.bridge.rowwise_model import Make
from ftrain.bridge.skeleton import build, nest, parameters
from ftrain.bridge.specs import beginnings, fix, inits_of, specs_of
from ftrain.bridge.weights import loader, saver, stored_buffers
from ftrain.modules.model import Model

Tables = Callable[[nn.Module], set[str]]


def media_model(make: Make, dtype: torch.dtype, folder: Path | None, tables: Tables) -> Model:
    """The model that `make` gives. `folder`: of its weights, if there are any."""
    module = build(partial(make, dtype=dtype, attention=NAME))
    fix(module)
    held = {} if folder is None else stored_buffers(module, folder)
    inits = inits_of(module, beginnings(module))
    specs = nest(specs_of(parameters(module), vocab=tables(module), experts=expert_leaves(module), inits=inits))
    made = Media.of(module, held)
    made = replace(made, leaves=leaves(made))
    made.arguments  # noqa: B018  # looked up here: in a step it would be traced twice
    return Model(
        name=f"{made.name} of transformers",
        specs=specs,
        batch=made.leaves,
        loss=made.loss,
        routed=made.routed if made.routes else None,
        rebalanced=made.rebalanced if made.balanced else None,
        token_losses=made.token_losses,
        logits=made.logits,
        hidden=made.hidden,
        load=loader(module, folder, specs),
        save=saver(module, made.held),
        state=made.state,
        media=partial(prepared, module),
        packs=False,
        alone="it reads media, whose places are those of rows",
        plain=None,
        why="bridged",
    )
