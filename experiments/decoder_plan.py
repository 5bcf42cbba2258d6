"""A decoder for pre-training as a search of layouts sees it: `ftrain plan experiments/decoder_plan.py --gpus 128`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import ftrain
from experiments.planned_step import planned_step
from ftrain import Aval, Mean, Precision, tree
from ftrain.modules import decoder, moe
from ftrain.modules.decoder import DecoderConfig
from ftrain.plan.space import Candidate, ModelShape
from ftrain.plan.workload import WorkloadStep

_CPU = torch.device("cpu")
_LEAVES = ("tokens_T", "positions_T", "segments_T", "labels_T")


def plan_for_search(*, tokens: int, packs: int) -> "DecoderWorkload":
    """Qwen3-30B-A3B, `packs` packs of `tokens` tokens a step."""
    return DecoderWorkload("Qwen3-30B-A3B", decoder.preset("30b-a3b"), tokens=tokens, packs=packs)


@dataclass(frozen=True)
class DecoderWorkload:
    """A decoder trained with AdamW and clipping in bfloat16 over float32 masters, next-token loss over packs.

    `segmented`: packs hold several documents; without, each pack is one..
    """

    name: str
    cfg: DecoderConfig
    tokens: int
    packs: int
    segmented: bool = True
    compute: str = "bfloat16"
    whole_logits: bool = False

    @property
    def stacks(self) -> Mapping[str, int]:
        """All layers are alike."""
        return {"layers": self.cfg.layers}

    @cached_property
    def model_shape(self) -> ModelShape:
        """What decides which layouts are legal, and the model's FLOPs per token (6 per active weight but for the token
        table; 12 x tokens x heads x head dim x layers of attention).
        """
        cfg, heads = self.cfg, self.cfg.attention
        return ModelShape(
            tokens=self.tokens,
            packs=self.packs,
            layers=cfg.layers,
            d_model=cfg.d_model,
            heads=heads.heads,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            weight_flops=6.0 * active_weights(cfg),
            attention_flops=12.0 * self.tokens * heads.heads * heads.head_dim * cfg.layers,
            experts=cfg.moe.experts if cfg.moe else 0,
            top_k=cfg.moe.top_k if cfg.moe else 0,
        )

    def make(self, depths: Mapping[str, int], candidate: Candidate) -> WorkloadStep:
        """The training step of a decoder of `depths["layers"]` layers."""
        cfg = replace(self.cfg, layers=depths["layers"])
        segmented, whole_logits = self.segmented, self.whole_logits

        def loss_fn(params: Any, batch: Any) -> Any:
            segments_T = batch["segments_T"] if segmented else None
            hidden_TD, stats = decoder.apply(
                params, batch["tokens_T"], positions=batch["positions_T"], segments=segments_T, cfg=cfg
            )
            if whole_logits:
                return plain_loss(decoder.logits(params, hidden_TD, cfg), batch["labels_T"])
            terms = {"text": decoder.loss(params, hidden_TD, batch["labels_T"], cfg)}
            if stats.router is None:
                return terms["text"]
            terms["balance"] = moe.aux_loss(stats.router)
            return ftrain.weighted_sum(terms, {"balance": 1e-3})

        whole = self.tokens * self.packs
        batch = {name: Aval((whole,), torch.int64, _CPU) for name in _LEAVES if segmented or name != "segments_T"}
        return planned_step(
            loss_fn, decoder.specs(cfg), batch, rate=1e-4, micro_batches=candidate.micro_batches,
            precision=Precision(compute=self.compute),
        )  # fmt: skip


def plain_loss(scores_TV: Tensor, labels_T: Tensor) -> Mean:
    """Cross entropy of scores `[T, V]`, in float32."""
    total = cross_entropy(scores_TV.float(), labels_T, reduction="sum", ignore_index=decoder.IGNORE)
    return Mean(total, (labels_T != decoder.IGNORE).sum().float())


def active_weights(cfg: DecoderConfig) -> int:
    """Weights that one token is multiplied with, the head's included and the token table's not."""
    found = 0
    for path, spec in zip(tree.paths(decoder.specs(cfg)), tree.leaves(decoder.specs(cfg)), strict=True):
        if path.startswith("embedding") and not cfg.tie_embeddings:
            continue
        share = cfg.moe.top_k / cfg.moe.experts if cfg.moe is not None and "expert" in spec.axes else 1.0
        found += round(spec.elements * share)
    return found
