"""The ops that take most of a large model's step, each beside its floor on this card and beside other ways to do it.

Legend: T tokens, N documents, L tokens of a document, H query heads, G key/value heads, K head dim (in attention) or
experts per token (in products), D width, F hidden width of an expert, V vocabulary, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.bench.card.packs import on_device
from experiments.bench.card.telling import Ceilings, Stage, attempt, milliseconds
from experiments.bench.table import Row, row
from ftrain.kernels.attention import attention
from ftrain.kernels.documents import Documents
from ftrain.kernels.experts import experts_swiglu
from ftrain.kernels.grouped_mm import grouped_mm
from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
from ftrain.kernels.wide_mm import wide_mm

_BACKWARD = 2.5
"""Of attention's FLOPs, over those of its forward."""
_CHUNKS = (None, 1024, 2048, 4096)


@dataclass(frozen=True)
class Heads:
    """Causal attention of N documents of L tokens, in bfloat16."""

    T: int
    N: int
    H: int
    G: int
    K: int

    @property
    def L(self) -> int:
        """Tokens of a document."""
        return self.T // self.N

    @property
    def flops(self) -> float:
        """Of the forward: a causal query sees half of its document."""
        return 2.0 * self.H * self.K * self.T * self.L

    def make(self) -> list[Tensor]:
        """Random queries, keys and values."""
        widths = (self.H, self.G, self.G)
        return [torch.randn(self.T, heads, self.K, device="cuda").bfloat16().requires_grad_() for heads in widths]


def attentions(stage: Stage) -> None:
    """Attention forward and backward: ours by how tight its bounds are, and torch's other kernels."""
    heads = Heads(1024, 4, 8, 2, 64) if stage.tiny else Heads(16_384, 8, 32, 4, 128)
    ceilings = stage.ceilings
    bounds = {"exact": (heads.N, heads.L), "longest T": (heads.N, heads.T), "longest T, 64 documents": (64, heads.T)}
    for name, (most, longest) in bounds.items():
        attempt(f"attention, {name}", partial(_packed, f"attention, {name}", heads, most, longest, ceilings))
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        name = f"attention, SDPA {backend.name.split('_')[0].lower()}"
        attempt(name, partial(_sdpa, name, heads, backend, ceilings))
    attempt("attention, cuDNN over documents", partial(_cudnn_over_documents, heads, ceilings))


def _packed(name: str, heads: Heads, most: int, longest: int, ceilings: Ceilings) -> list[Row]:
    documents = on_device(Documents.of(torch.arange(heads.T) // heads.L, max_documents=most, longest=longest), "cuda")
    inputs = heads.make()
    return _both(name, lambda: attention(*inputs, segments_T=documents), inputs, heads, ceilings)


def _sdpa(name: str, heads: Heads, backend: SDPBackend, ceilings: Ceilings) -> list[Row]:
    inputs = [x.detach().view(heads.N, heads.L, -1, heads.K).transpose(1, 2).requires_grad_() for x in heads.make()]
    q, k, v = inputs

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return _both(name, forward, inputs, heads, ceilings)


def _both(
    name: str, forward: Callable[[], Tensor], inputs: list[Tensor], heads: Heads, ceilings: Ceilings
) -> list[Row]:
    slope = torch.randn_like(forward())
    ahead = milliseconds(forward)
    back = max(1e-6, milliseconds(lambda: torch.autograd.grad(forward(), inputs, slope)) - ahead)
    return [
        _beside_floor(f"{name}: forward", ahead, heads.flops, ceilings, heads),
        _beside_floor(f"{name}: backward", back, _BACKWARD * heads.flops, ceilings, heads),
    ]


def _beside_floor(name: str, ms: float, flops: float, ceilings: Ceilings, what: Any) -> Row:
    floor = 1e3 * flops / ceilings.bfloat16
    peer = f"floor {floor:.3f}, {flops / ms / 1e9:.0f} TFLOP/s"
    return row(name, ms, "ms", peer=peer, how=f"{what}; floor: its FLOPs at the rate of the best bfloat16 product")


def _cudnn_over_documents(heads: Heads, ceilings: Ceilings) -> list[Row]:
    """An op that torch has and does not use for packs: is it right, and is it faster?"""
    q, k, v = (x.detach() for x in heads.make())
    offsets_N = torch.arange(heads.N + 1, dtype=torch.int32, device="cuda") * heads.L
    bounds = (offsets_N, offsets_N, heads.L, heads.L)

    def run() -> Any:
        return torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, *bounds, True, 0.0, True, False, scale=heads.K**-0.5
        )

    documents = on_device(Documents.of(torch.arange(heads.T) // heads.L, longest=heads.L), "cuda")
    wanted = attention(q, k, v, segments_T=documents).float()
    error = float((run()[0].float() - wanted).norm() / wanted.norm())
    name = "attention, cuDNN over documents"
    return [
        _beside_floor(f"{name}: forward", milliseconds(run), heads.flops, ceilings, heads),
        row(f"{name}: off ours", error, "", how="|found - ours| / |ours|"),
    ]


@dataclass(frozen=True)
class Products:
    """Sizes of a large model's head and experts."""

    T: int
    D: int
    V: int
    E: int
    F: int
    K: int


def products(stage: Stage) -> None:
    """The head's loss by size of its chunks, products of groups of rows, a layer of experts, the router's product."""
    p = Products(512, 128, 1024, 8, 64, 2) if stage.tiny else Products(8192, 2048, 151_936, 128, 768, 8)
    ceilings = stage.ceilings
    for chunk in _CHUNKS:
        attempt(f"loss over {p.V} words, chunk {chunk}", partial(_head, p, chunk, ceilings))
        torch.cuda.empty_cache()
    attempt("groups of rows", partial(_groups, p, ceilings))
    attempt("experts", partial(_layer, p, ceilings))
    attempt("router", partial(_router, p))


def _head(p: Products, chunk: int | None, ceilings: Ceilings) -> Row:
    x_TD, w_DV = _half(p.T, p.D).requires_grad_(), (_half(p.D, p.V) * 0.02).requires_grad_()
    labels_T = torch.randint(0, p.V, (p.T,), device="cuda")

    def both() -> Any:
        loss = linear_cross_entropy(x_TD, w_DV, labels_T, chunk_tokens=chunk).sum()
        return torch.autograd.grad(loss, (x_TD, w_DV))

    ms = milliseconds(both, repeats=4, warmup=2)
    return _beside_floor(f"loss over {p.V} words, chunk {chunk}", ms, 6.0 * p.T * p.D * p.V, ceilings, p)


def _half(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def _groups(p: Products, ceilings: Ceilings) -> list[Row]:
    rows_ND, w_EDF = _half(p.T * p.K, p.D), _half(p.E, p.D, p.F) * 0.02
    even_E = (torch.arange(1, p.E + 1, device="cuda") * (p.T * p.K // p.E)).to(torch.int32)
    one_E = torch.full((p.E,), p.T * p.K, dtype=torch.int32, device="cuda")
    flops = 2.0 * p.T * p.K * p.D * p.F
    return [
        _beside_floor(name, milliseconds(partial(grouped_mm, rows_ND, w_EDF, ends_E)), flops, ceilings, p)
        for name, ends_E in (("groups of rows, even", even_E), ("groups of rows, one has all", one_E))
    ]


def _layer(p: Products, ceilings: Ceilings) -> Row:
    expert_TK = torch.randint(0, p.E, (p.T, p.K), device="cuda")
    weights_TK = torch.rand(p.T, p.K, device="cuda")
    matrices = (_half(p.E, p.D, p.F) * 0.02, _half(p.E, p.D, p.F) * 0.02, _half(p.E, p.F, p.D) * 0.02)
    x_TD = _half(p.T, p.D)
    ms = milliseconds(lambda: experts_swiglu(x_TD, expert_TK, weights_TK, *matrices))
    return _beside_floor("experts: forward", ms, 6.0 * p.T * p.K * p.D * p.F, ceilings, p)


def _router(p: Products) -> Row:
    x_TD, w_DE = _half(p.T, p.D), _half(p.D, p.E)
    wide = milliseconds(lambda: wide_mm(x_TD, w_DE, backend="reference"))
    how = f"{p}; bfloat16 factors and float32 sums; peer: the same by way of float32 copies"
    return row("router: scores", milliseconds(lambda: wide_mm(x_TD, w_DE)), "ms", peer=wide, how=how)
