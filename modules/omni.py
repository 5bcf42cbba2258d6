"""Omni composition: encoders turn media into rows of a foundation's token stream, decoders turn hidden rows into media.

The verbs are VeOmni's (github.com/ByteDance-Seed/VeOmni, seed_omni). An encoder has `lm_encode`; a decoder has
`lm_encode` (target -> rows and codes), `lm_head` (hidden rows -> loss), and for generation `lm_logits`, `lm_embed` and
`lm_generate`. Each is a plain function of its own parameters. Adding a modality is one file that builds an `Encoder` or
a `Decoder`, and one entry in the dictionary given to `OmniModel`.

A decoder may hold parameters that the foundation's training must not move, such as a VQ tokenizer. They live in the one
tree, under the names in `Decoder.frozen`, so that they are sharded, saved and found like all others; they reach the
loss only through integer codes, so their gradients are zero, and `trainable` is the mask to give the optimizer, which
then neither decays them nor keeps moments for them.

Legend: T tokens of the packed stream, D width of the foundation, n rows of one modality (tokens or codes), B targets,
N codes of one target, C number of distinct codes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.embedding import merge_rows
from ftrain.kernels.mean import Mean
from ftrain.kernels.pack import pack_tokens, take_rows
from ftrain.modules import decoder as foundation
from ftrain.modules import moe
from ftrain.modules.decoder import DecoderConfig, DecoderStats
from ftrain.modules.spec import Tree, map_with_paths

RESERVED_TERMS = ("text", "balance")


class Row(NamedTuple):
    """One row of a feature array: its shape without the row dim, and its numpy dtype by name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Encoder:
    """A modality that the foundation reads.

    `specs`: tree of ParamSpec. `lm_encode(params, features) -> [n, D]`: packed features, whose arrays have rows first
    and include `segments_N` (ids or `Documents`), to rows of the token stream, `rows_per_token` feature rows to one
    token. `features`: the arrays of one item, without `segments_N`. `begin`, `end`: ids of the text tokens put around
    an item.
    """

    specs: Tree
    lm_encode: Callable[[Tree, Mapping[str, Any]], Tensor]
    features: Mapping[str, Row]
    rows_per_token: int
    begin: int
    end: int


@dataclass(frozen=True)
class Decoder:
    """A modality that the foundation writes, as `codes_per_target` integers each.

    `lm_encode(params, target_B...) -> (embeds [B*N, D], codes [B*N] int64)`; `lm_head(params, hidden [n, D],
    codes [n]) -> Mean` where codes of -100 count nothing and `hidden[i]` is the state *before* code i;
    `lm_logits(params, hidden [n, D]) -> [n, C]`; `lm_embed(params, codes_BN) -> [B*N, D]`;
    `lm_generate(params, codes_BN) -> target_B...`. `target`: one target's shape and dtype. `frozen`: names of the
    top-level subtrees of `specs` that training leaves as they are.
    """

    specs: Tree
    lm_encode: Callable[[Tree, Tensor], tuple[Tensor, Tensor]]
    lm_head: Callable[[Tree, Tensor, Tensor], Mean]
    lm_logits: Callable[[Tree, Tensor], Tensor]
    lm_embed: Callable[[Tree, Tensor], Tensor]
    lm_generate: Callable[[Tree, Tensor], Tensor]
    target: Row
    codes_per_target: int
    begin: int
    end: int
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class OmniModel:
    """A foundation with named encoders and decoders; the names are the modalities' names in documents and losses.

    ValueError for a decoder with the name of another loss (`RESERVED_TERMS`).
    """

    foundation: DecoderConfig
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    decoders: Mapping[str, Decoder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = [name for name in self.decoders if name in RESERVED_TERMS]
        if taken:
            raise ValueError(f"a decoder cannot be called {taken[0]!r}: {RESERVED_TERMS} are names of other losses")

    def encoder(self, modality: str) -> Encoder:
        """The encoder of a modality; ValueError that names the known ones if there is none."""
        return _lookup(self.encoders, modality, "encoder")

    def decoder(self, modality: str) -> Decoder:
        """The decoder of a modality; ValueError that names the known ones if there is none."""
        return _lookup(self.decoders, modality, "decoder")


def _lookup(parts: Mapping[str, Any], modality: str, kind: str) -> Any:
    if modality not in parts:
        raise ValueError(f"the model has no {kind} for modality {modality!r}; it has {sorted(parts) or 'none'}")
    return parts[modality]


def specs(model: OmniModel) -> dict[str, Tree]:
    """The whole tree: `foundation`, `encoders.<name>`, `decoders.<name>`.

    >>> from ftrain.modules.decoder import preset
    >>> model = OmniModel(preset("llama-tiny"))
    >>> sorted(specs(model))
    ['decoders', 'encoders', 'foundation']
    """
    return {
        "foundation": foundation.specs(model.foundation),
        "encoders": {name: encoder.specs for name, encoder in model.encoders.items()},
        "decoders": {name: decoder.specs for name, decoder in model.decoders.items()},
    }


def trainable(model: OmniModel) -> dict[str, Tree]:
    """A tree of bools shaped as the parameters: False for what lies in a decoder's `frozen` subtrees, else True.

    >>> from ftrain.modules.decoder import preset
    >>> model = OmniModel(preset("llama-tiny"))
    >>> trainable(model)["foundation"]["norm"]
    {'weight_D': True}
    """
    tree = map_with_paths(lambda path, _: True, specs(model))
    for name, decoder in model.decoders.items():
        for child in decoder.frozen:
            tree["decoders"][name][child] = map_with_paths(lambda path, _: False, decoder.specs[child])
    return tree


class Rows(NamedTuple):
    """What goes over the stream: lists of rows `[n, D]` and their places `[n]`; and per decoder the codes `[n]`."""

    rows: list[Tensor]
    places: list[Tensor]
    codes: dict[str, Tensor]


def media_rows(params: Tree, batch: Mapping[str, Any], *, model: OmniModel) -> Rows:
    """Run the encoders, and the decoders' `lm_encode`, of the modalities that are in the batch, and of no others.

    ValueError for rows that are not as wide as the foundation's.
    """
    out = Rows([], [], {})
    for name, part in batch.get("encoders", {}).items():
        rows = model.encoder(name).lm_encode(params["encoders"][name], part["features"])
        out.rows.append(_as_wide(rows, f"encoder {name!r}", model))
        out.places.append(part["index_n"])
    for name, part in batch.get("decoders", {}).items():
        embeds, out.codes[name] = model.decoder(name).lm_encode(params["decoders"][name], part["target"])
        out.rows.append(_as_wide(embeds, f"decoder {name!r}", model))
        out.places.append(part["index_n"])
    return out


def _as_wide(rows_nD: Tensor, who: str, model: OmniModel) -> Tensor:
    if rows_nD.ndim != 2 or rows_nD.shape[1] != model.foundation.d_model:
        raise ValueError(
            f"the {who} makes rows {list(rows_nD.shape)}, and those of the foundation are {model.foundation.d_model} "
            "wide: give it that as d_out or d_model"
        )
    return rows_nD


def merge(x_TD: Tensor, rows: list[Tensor], places: list[Tensor]) -> Tensor:
    """Write the rows of all modalities over their places in the stream, in one pass; a place of T is dropped."""
    if not rows:
        return x_TD
    return merge_rows(x_TD, torch.cat([r.to(x_TD.dtype) for r in rows]), torch.cat(places))


def loss_terms(
    params: Tree, batch: Mapping[str, Any], *, model: OmniModel, balance: Tree = None
) -> tuple[dict[str, Mean], DecoderStats]:
    """Losses of a packed batch (modules/packing.py), each a `Mean`, and the foundation's statistics.

    Terms: `"text"` (next token, nats per labelled token), one per decoder in the batch (next code, nats per code), and
    `"balance"` where the foundation's experts are balanced by a loss (`moe.aux_loss`, to be weighted by
    `aux_coefficient`). `balance`: the state of loss-free balancing, as in `decoder.apply`. ValueError if the batch
    names a modality that the model lacks.
    """
    rows, places, codes = media_rows(params, batch, model=model)
    x_TD = merge(foundation.embed(params["foundation"], batch["tokens_T"]), rows, places)
    hidden_TD, stats = hidden_states(params, x_TD, batch, model=model, balance=balance)
    terms = {"text": foundation.loss(params["foundation"], hidden_TD, batch["labels_T"], model.foundation)}
    for name, codes_n in codes.items():
        place_n = batch["decoders"][name]["index_n"]
        # Padding stands after the last token: it reads zeros, and its label keeps that out of the loss.
        nowhere = pack_tokens(x_TD.shape[0])
        labels_n = torch.where(place_n < nowhere, codes_n, foundation.IGNORE)
        hidden_nD = take_rows(hidden_TD, torch.where(place_n < nowhere, place_n - 1, nowhere))
        terms[name] = model.decoder(name).lm_head(params["decoders"][name], hidden_nD, labels_n)
    if stats.router is not None and model.foundation.balance == "aux":
        terms["balance"] = moe.aux_loss(stats.router)
    return terms, stats


def hidden_states(
    params: Tree, x_TD: Tensor, batch: Mapping[str, Any], *, model: OmniModel, balance: Tree = None
) -> tuple[Tensor, DecoderStats]:
    """The foundation over a merged stream: `[T, D]` to hidden states `[T, D]`, and its statistics."""
    return foundation.apply(
        params["foundation"],
        x_TD,
        positions=batch["positions_T"],
        segments=batch["segments_T"],
        cfg=model.foundation,
        balance=balance,
        valid=batch["valid_T"],
    )
