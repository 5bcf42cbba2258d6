"""A decoder's training step and its pack of documents, which is made on the host and then sent to a device.

Documents are counted where they are made: a count on the device is a wait of the host (and on the null device garbage).

Legend: T tokens of the pack.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ftrain
from ftrain import TrainState, optim, tree
from ftrain.kernels.documents import Documents
from ftrain.modules import decoder
from ftrain.modules.decoder import DecoderConfig


def on_device(values: Any, device: torch.device | str) -> Any:
    """A tree with its tensors on the device, those of `Documents` too."""
    return tree.map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, values)


def pack(tokens_T: Tensor, *, length: int, longest: int | None = None, packs: int = 1) -> dict[str, Any]:
    """Documents of `length` tokens each, one after the other, on the host; `longest`, `packs`: as in `Documents.of`."""
    at_T = torch.arange(len(tokens_T))
    segments_T = at_T // length
    return {
        "tokens_T": tokens_T,
        "positions_T": at_T % length,
        "segments_T": Documents.of(segments_T, longest=longest, packs=packs),
        "labels_T": decoder.next_token_labels(tokens_T, segments_T),
    }


def decoder_step(cfg: DecoderConfig, tx: optim.Transform) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
    """The pure step `(state, batch) -> (state, metrics)` over a `pack`."""

    def loss_fn(params: Any, batch: Any) -> Any:
        hidden_TD, _ = decoder.apply(
            params, batch["tokens_T"], positions=batch["positions_T"], segments=batch["segments_T"], cfg=cfg
        )
        return decoder.loss(params, hidden_TD, batch["labels_T"], cfg)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
        return state.apply(tx, grads), {"loss": loss}

    return train_step
