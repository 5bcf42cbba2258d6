"""The decoders that the stages train: a dense one and a mixture of experts, their steps, states and batches.

Legend: T tokens of the pack.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import ftrain
from experiments.bench.card.packs import decoder_step, on_device, pack
from experiments.bench.hf_models import Shape, our_config
from ftrain import Precision, TrainState, optim
from ftrain.modules import decoder
from ftrain.remat.policy import Remat


@dataclass(frozen=True)
class Size:
    """A decoder and its batch: `tokens` in `documents` documents of one length."""

    shape: Shape
    tokens: int
    documents: int

    @property
    def length(self) -> int:
        """Tokens of a document."""
        return self.tokens // self.documents

    @property
    def flops(self) -> float:
        """Of a step: 6 for each weight and token (experts: those a token uses), and causal attention counted half.

        The token table is looked up, not multiplied. What is computed again does not count.
        """
        s = self.shape
        heads = s.d_model * s.head_dim * (2 * s.heads + 2 * s.kv_heads)
        hidden = 3 * s.d_model * s.d_hidden * max(1, s.top_k) + s.d_model * s.experts
        weights = s.layers * (heads + hidden) + s.d_model * s.vocab
        return 6.0 * self.tokens * (weights + s.layers * s.heads * s.head_dim * self.length)


def _mixture(dense: Shape, *, layers: int, d_hidden: int, experts: int, top_k: int) -> Shape:
    return Shape(**{**vars(dense), "layers": layers, "d_hidden": d_hidden, "experts": experts, "top_k": top_k})


_TINY = Shape(vocab=512, d_model=128, layers=2, heads=4, kv_heads=2, head_dim=32, d_hidden=256)
_FAST = Shape(vocab=32_000, d_model=1024, layers=12, heads=16, kv_heads=4, head_dim=64, d_hidden=4096)
_LARGE = Shape(vocab=32_000, d_model=2048, layers=4, heads=16, kv_heads=4, head_dim=128, d_hidden=5632)

SMALL = {
    "dense": Size(_TINY, 512, 4),
    "moe": Size(_mixture(_TINY, layers=2, d_hidden=64, experts=8, top_k=2), 512, 4),
}
"""Small enough for a CPU to give the same losses in seconds."""
FAST = {
    "dense": Size(_FAST, 16_384, 8),
    "moe": Size(_mixture(_FAST, layers=8, d_hidden=512, experts=32, top_k=4), 16_384, 8),
}
"""Large enough to keep a card busy."""
LARGE = {
    "dense": Size(_LARGE, 16_384, 8),
    "moe": Size(_mixture(_LARGE, layers=4, d_hidden=704, experts=16, top_k=2), 16_384, 8),
}
"""A few layers as wide as those of a large model, for memory."""


class Training(NamedTuple):
    """A jitted step with its state and batch: `state, metrics = step(state, batch)`."""

    step: ftrain.Step
    state: TrainState
    batch: dict[str, Any]


def training(
    size: Size,
    *,
    backend: str,
    compute: str = "bfloat16",
    device: str = "cuda",
    remat: Remat | str | None = None,
) -> Training:
    """A decoder of this size, made ready to train: clipping and AdamW, weights and batch from fixed seeds."""
    cfg = our_config(size.shape)
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(3e-4))

    train_step, precision = decoder_step(cfg, tx), Precision(compute=compute)
    step = ftrain.jit(train_step, donate="state", backend=backend, remat=remat, precision=precision)
    params = ftrain.init(decoder.specs(cfg), ftrain.key(0, device=device))
    return Training(step, TrainState.create(params, tx), on_device(_batch(size), device))


def _batch(size: Size) -> dict[str, Any]:
    tokens_T = torch.randint(0, size.shape.vocab, (size.tokens,), generator=torch.Generator().manual_seed(1))
    return pack(tokens_T, length=size.length, longest=size.length)


def stepping(made: Training) -> Callable[[], Any]:
    """A call that makes one step and does not wait for it; returns the loss, still on its way."""
    held = [made.state]

    def one() -> Any:
        held[0], metrics = made.step(held[0], made.batch)
        return metrics["loss"]

    return one
