"""Full training of Wan as a search of layouts sees it: `ftrain plan experiments/wan_plan.py --gpus 8 --gpu h200`.

Tokens are patches of latents: `--tokens 75600` is a clip of 81 frames of 720 x 1280, 32760 one of 480 x 832.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from experiments.planned_step import planned_step
from ftrain import Aval, Precision
from ftrain.bridge.native_wan import NativeWan
from ftrain.modules.families import wan
from ftrain.modules.families.wan_config import PUBLISHED, WanConfig, config, keep_float32
from ftrain.modules.families.wan_latents import rules
from ftrain.plan.space import Candidate, ModelShape
from ftrain.plan.workload import WorkloadStep

_CPU = torch.device("cpu")
_PICTURE = 257  # rows of the image encoder


def plan_for_search(*, tokens: int, packs: int, size: str = "2.1-t2v-14b") -> "WanWorkload":
    """A published Wan, `packs` clips of `tokens` patches a step. ValueError for an unknown size."""
    if size not in PUBLISHED:
        raise ValueError(f"--size {size} is not one of {', '.join(PUBLISHED)}")
    return WanWorkload(f"Wan {size}", config(PUBLISHED[size]), tokens=tokens, packs=packs)


@dataclass(frozen=True)
class WanWorkload:
    """All of Wan trained with AdamW and clipping in bfloat16 over float32 masters, the residual stream and what the
    authors compute in float32 in float32; a pack is one clip, and each clip has a time of its own.
    """

    name: str
    cfg: WanConfig
    tokens: int
    packs: int

    @property
    def stacks(self) -> Mapping[str, int]:
        """All layers are alike."""
        return {"layers": self.cfg.layers}

    @cached_property
    def model_shape(self) -> ModelShape:
        """What decides which layouts are legal, and the FLOPs of a patch: three forward passes, all of attention."""
        cfg = self.cfg
        products, attention = forward_flops(cfg, self.tokens)
        return ModelShape(
            tokens=self.tokens,
            packs=self.packs,
            layers=cfg.layers,
            d_model=cfg.d_model,
            heads=cfg.heads,
            kv_heads=cfg.heads,
            head_dim=cfg.head_dim,
            weight_flops=3.0 * products / self.tokens,
            attention_flops=3.0 * attention / self.tokens,
            causal=False,
        )

    def make(self, depths: Mapping[str, int], candidate: Candidate) -> WorkloadStep:
        """The training step of a model of `depths["layers"]` layers."""
        cfg = replace(self.cfg, layers=depths["layers"])
        return planned_step(
            NativeWan(cfg).loss, wan.specs(cfg), self._batch(), rate=1e-5, micro_batches=candidate.micro_batches,
            precision=Precision(compute="bfloat16", keep=keep_float32(cfg)), rules=rules(cfg),
        )  # fmt: skip

    def _batch(self) -> dict[str, Aval]:
        cfg, rows = self.cfg, self.tokens * self.packs
        wide = {"latents": (rows, cfg.row_in), "target": (rows, cfg.row_out), "times": (self.packs,)}
        wide["text"] = (self.packs * cfg.text_rows, cfg.d_text)
        if cfg.d_image:
            wide["image"] = (self.packs * -(-_PICTURE // 64) * 64, cfg.d_image)
        made = {name: Aval(shape, torch.float32, _CPU) for name, shape in wide.items()}
        for name, shape in {"positions": (rows, 3), "time_rows": (rows,)}.items():
            made[name] = Aval(shape, torch.int64, _CPU)
        return made


def forward_flops(cfg: WanConfig, rows: int) -> tuple[int, int]:
    """FLOPs of a forward pass over one clip of so many rows (a multiply-add is two): of products, and of attention.

    >>> products, attention = forward_flops(config(PUBLISHED["2.1-t2v-14b"]), 75_600)
    >>> f"{(products + attention) / 1e12:.1f}"
    '6523.4'
    """
    d, hidden, pictures = cfg.d_model, cfg.d_hidden, _PICTURE if cfg.d_image else 0
    read = cfg.text_rows + pictures
    products = cfg.layers * (12 * rows * d**2 + 4 * read * d**2 + 4 * rows * d * hidden)
    products += 2 * rows * d * (cfg.row_in + cfg.row_out) + 2 * cfg.text_rows * (cfg.d_text * d + d**2)
    products += 2 * (cfg.time_features * d + 7 * d**2) + 2 * pictures * (cfg.d_image**2 + cfg.d_image * d)
    return products, cfg.layers * (4 * rows**2 * d + 4 * rows * read * d)
