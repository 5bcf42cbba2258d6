"""The composition: one decoder whose experts all modalities share and each modality reaches by a router of its own.

Pictures and sounds come in through projectors whose rows have length 1, and go out as codes beside the text's tokens.
Source: Inclusion AI, Ming-Omni, arXiv 2506.09344.

Legend: T tokens of the pack, W numbers of a heard frame, P numbers of a patch, D width, V ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.mean import Mean
from ftrain.modules import decoder, linear, moe
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig, DecoderStats
from ftrain.modules.modality_experts import modality_experts
from ftrain.modules.moe import MoEConfig
from ftrain.modules.spec import Tree

TEXT, SOUND, PICTURE = 0, 1, 2
"""Modalities, as `kind_T` has them."""
TERMS = {"writes": TEXT, "speaks": SOUND, "draws": PICTURE}
"""The losses, by the modality of what is predicted."""


@dataclass(frozen=True)
class Composed:
    """`window` and `patch`: numbers of a heard frame and of a patch; `ids`: of text, units of sound, codes of pictures.

    `d` wide, `layers` layers of `heads` heads, `experts` experts of which a token uses two.
    """

    window: int
    patch: int
    ids: int
    d: int = 64
    layers: int = 3
    heads: int = 4
    experts: int = 8

    def decoder(self, kind_T: Tensor) -> DecoderConfig:
        """The decoder of tokens of these modalities."""
        heads = AttentionConfig(self.d, self.heads, self.heads, self.d // self.heads, qk_norm=True)
        experts = MoEConfig(self.d, self.d, experts=self.experts, top_k=2, shared_experts=1)
        plain = DecoderConfig(self.ids, self.d, self.layers, heads, moe=experts)
        layer = decoder.layer_with(plain, mlp=modality_experts(experts, kind_T, modalities=len(TERMS)))
        return replace(plain, pattern=(layer,))


def specs(cfg: Composed) -> dict[str, Any]:
    """`decoder`, `sound`, `picture`."""
    return {
        "decoder": decoder.specs(cfg.decoder(torch.zeros(0, dtype=torch.int64))),
        "sound": _projector(cfg.window, "frequency", cfg.d),
        "picture": _projector(cfg.patch, "patch", cfg.d),
    }


def _projector(into: int, axis: str, d: int) -> Tree:
    return {
        "up": linear.specs(into, 2 * d, (axis, "mlp"), bias=True),
        "down": linear.specs(2 * d, d, ("mlp", "embed"), bias=True),
    }


def _projected(params: Tree, x: Tensor) -> Tensor:
    return F.normalize(linear.apply(params["down"], F.gelu(linear.apply(params["up"], x))), dim=-1)


def hidden(params: Tree, batch: Mapping[str, Any], cfg: Composed) -> tuple[Tensor, DecoderStats]:
    """The hidden states `[T, D]` of a pack as `experiments.ming.answer.lay` makes it, and what routers did."""
    x_TD = decoder.embed(params["decoder"], batch["tokens_T"])
    for given, name, leaf in ((SOUND, "sound", "heard_TW"), (PICTURE, "picture", "seen_TP")):
        x_TD = torch.where((batch["given_T"] == given)[:, None], _projected(params[name], batch[leaf]), x_TD)
    return decoder.apply(
        params["decoder"],
        x_TD,
        positions=batch["positions_T"],
        segments=batch["documents_T"],
        cfg=cfg.decoder(batch["kind_T"]),
    )


def loss_terms(params: Tree, batch: Mapping[str, Any], cfg: Composed) -> dict[str, Mean]:
    """`writes`, `speaks`, `draws` (nats of an id), and `even` (the load of experts, of each router)."""
    hidden_TD, stats = hidden(params, batch, cfg)
    assert stats.router is not None
    own = cfg.decoder(batch["kind_T"])
    terms = {}
    for name, kind in TERMS.items():
        labels_T = torch.where(batch["next_kind_T"] == kind, batch["labels_T"], decoder.IGNORE)
        terms[name] = decoder.loss(params["decoder"], hidden_TD, labels_T, own)
    return {**terms, "even": moe.aux_loss(stats.router)}


def scores(params: Tree, batch: Mapping[str, Any], cfg: Composed) -> Tensor:
    """Of all ids, `[T, V]`."""
    hidden_TD, _ = hidden(params, batch, cfg)
    return decoder.logits(params["decoder"], hidden_TD, cfg.decoder(batch["kind_T"]))
