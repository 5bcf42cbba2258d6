"""A `Model` of transformers that reads a source and writes a text.

Legend: S tokens of the sources in a pack, T tokens of the targets, B rows, L tokens of a row.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftrain.bridge.batches import IGNORED, rows
from ftrain.bridge.pairs import apart
from ftrain.bridge.plain import plain_loss_of
from ftrain.bridge.rowwise_model import Make, suited
from ftrain.bridge.seq2seq import Seq2Seq, leaves
from ftrain.bridge.skeleton import build, nest, parameters
from ftrain.bridge.specs import beginnings, fix, inits_of, specs_of
from ftrain.bridge.weights import loader, saver, stored_buffers
from ftrain.kernels.documents import ids_of
from ftrain.kernels.mean import Mean
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree, abstract

Tables = Callable[[nn.Module], set[str]]
"""The names of a module's table of tokens and of its head."""


def seq2seq_model(make: Make, dtype: torch.dtype, folder: Path | None, tables: Tables) -> Model:
    """The encoder-decoder that `make` gives. `folder`: of its weights, if there are any."""
    made, specs = _made(suited(partial(make, dtype=dtype)), folder, tables)
    alone = _apart(made, specs)
    if alone and made.module.config._attn_implementation != "eager":  # type: ignore[union-attr]
        made, specs = _made(build(partial(make, dtype=dtype, attention="eager")), folder, tables)
    made = replace(made, alone=alone).settled()
    module = made.module
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
        packs=not alone,
        alone=alone,
        plain=partial(_plain, make, made),
        why="bridged",
    )


def _made(module: nn.Module, folder: Path | None, tables: Tables) -> tuple[Seq2Seq, Tree]:
    fix(module)
    held = {} if folder is None else stored_buffers(module, folder)
    specs = nest(specs_of(parameters(module), vocab=tables(module), inits=inits_of(module, beginnings(module))))
    return replace(Seq2Seq.of(module, held), leaves=leaves()), specs


def _apart(made: Seq2Seq, specs: Tree) -> str:
    """Why documents cannot share a pack, empty if they can. A model that is not traced on a pack takes rows."""
    if made.module.main_input_name != "input_ids":
        return "its source is no text"
    try:
        return apart(made, abstract(specs))
    except Exception as error:  # whatever a module of others does with a pack, rows are left
        return f"it cannot be traced on a pack ({type(error).__name__}: {error})"


def _plain(make: Make, made: Seq2Seq, params: Tree, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    module = make(dtype=torch.float32, attention="eager", experts="eager")
    return plain_loss_of(module, _by_pairs, params, batch)


def _by_pairs(module: nn.Module, batch: Mapping[str, Any]) -> Mean:
    """The loss of each source and target by itself."""
    name: Any = module.main_input_name
    total, count = torch.zeros((), dtype=torch.float64), 0
    for source, mask, tokens_L, labels_L in _pairs(batch):
        given = {} if mask is None else {"attention_mask": mask[None].long()}
        source = source.double() if source.dtype.is_floating_point else source
        logits = module(**{name: source[None]}, decoder_input_ids=tokens_L[None], use_cache=False, **given).logits[0]
        total = total + nn.functional.cross_entropy(logits, labels_L, ignore_index=IGNORED, reduction="sum")
        count += int((labels_L != IGNORED).sum())
    return Mean(total, torch.tensor(float(count)))


def _pairs(batch: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    """Source, its mask, tokens and labels of each document."""
    if batch.get("segments") is None:
        masks = batch.get("source_mask")
        for row, source in enumerate(rows(batch["source"])):
            mask = None if masks is None else masks[row]
            yield source, mask, rows(batch["tokens"])[row], rows(batch["labels"])[row]
        return
    for here, there in zip(_spans(batch["segments"]), _spans(batch["source_segments"]), strict=True):
        yield batch["source"][there], None, batch["tokens"][here], batch["labels"][here]


def _spans(segments: Any) -> list[slice]:
    ids = ids_of(segments)
    edges = [0, *(torch.nonzero(ids.diff()).flatten() + 1).tolist(), len(ids)]
    return [slice(*pair) for pair in pairwise(edges)]
