"""A million tokens of context as a search of layouts sees them: `ftrain plan experiments/long_context/plan.py`.

    ftrain plan experiments/long_context/plan.py --gpus 64 --tokens 1M --packs 1 --seconds 600

The model has the shape of Qwen3-30B-A3B with the attention of this experiment: of six layers five see a window of 1,024
tokens, and one sees all, without rotary positions. `--size every` is the same with a window in no layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from experiments.decoder_plan import DecoderWorkload
from experiments.long_context.model import seeing_all
from ftrain.modules import decoder
from ftrain.modules.decoder import DecoderConfig, layer_with
from ftrain.plan.space import Candidate, ModelShape
from ftrain.plan.workload import WorkloadStep

TURN = 6
"""Layers of which the last sees all."""

WINDOW = 1024


def foundation(window: int | None = WINDOW) -> DecoderConfig:
    """Qwen3-30B-A3B's shape with these windows; with None every layer sees all, by rotary positions."""
    base = decoder.preset("30b-a3b")
    if window is None:
        return base
    local = replace(base, attention=replace(base.attention, window=window))
    wide = layer_with(local, attention=seeing_all(replace(base.attention, rope_base=None)))
    return replace(local, pattern=(*[None] * (TURN - 1), wide))


def plan_for_search(*, tokens: int, packs: int, size: str = "windows") -> "LongWorkload":
    """What `ftrain plan` searches. ValueError for a size that is not "windows" or "every"."""
    if size not in ("windows", "every"):
        raise ValueError(f"--size {size!r}: give windows (five of six layers see 1,024 tokens) or every (all see all)")
    name = "30B-A3B, one layer of six sees all" if size == "windows" else "30B-A3B, every layer sees all"
    return LongWorkload(name, foundation(WINDOW if size == "windows" else None), tokens=tokens, packs=packs)


@dataclass(frozen=True)
class LongWorkload(DecoderWorkload):
    """As a decoder's, counted in turns of `TURN` layers, since those of a turn differ."""

    @property
    def stacks(self) -> Mapping[str, int]:
        """The turns, which are alike."""
        return {"turns": self.cfg.layers // TURN}

    @cached_property
    def model_shape(self) -> ModelShape:
        """As a decoder's, with what windows leave of the FLOPs of attention; these count both sides of a token."""
        whole = super().model_shape
        seen = [self.tokens if self.cfg.own(i) or not self.cfg.attention.window else 2 * self.cfg.attention.window
                for i in range(self.cfg.layers)]  # fmt: skip
        heads = self.cfg.attention
        return replace(whole, attention_flops=12.0 * heads.heads * heads.head_dim * sum(seen))

    def make(self, depths: Mapping[str, int], candidate: Candidate) -> WorkloadStep:
        """The training step of a decoder of so many turns."""
        return super().make({"layers": depths["turns"] * TURN}, candidate)
