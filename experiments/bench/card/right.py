"""Are the kernels right on this card? Results and gradients against float64, random numbers against the CPU's.

Legend: T tokens, H query heads, G key/value heads, K head dim, D width, F hidden width, E experts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from experiments.bench.card.packs import on_device
from experiments.bench.card.telling import Stage, attempt
from experiments.bench.table import Row, row
from ftrain.kernels import random as keys
from ftrain.kernels.attention import attention, attention_reference
from ftrain.kernels.documents import Documents
from ftrain.kernels.experts import experts_swiglu
from ftrain.kernels.grouped_mm import grouped_mm, grouped_mm_reference
from ftrain.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ftrain.kernels.wide_mm import wide_mm, wide_mm_reference

HALF = 1e-2
"""Bfloat16 operands leave an error between 1e-3 and this."""
_T = 512
_ATTENTION = {"causal": (True, None), "causal, window": (True, 64), "full": (False, None), "full, window": (False, 64)}
_HEADS = {"64": (8, 8, 64), "128, grouped": (8, 2, 128), "256, grouped": (4, 1, 256), "80, grouped": (8, 4, 80)}


def right(stage: Stage) -> None:
    """The largest relative error of a result and its gradients, and whether the same call gives the same bits."""
    for heads, shape in _HEADS.items():
        for rule, (causal, window) in _ATTENTION.items():
            name = f"attention, head dim {heads}, {rule}"
            attempt(name, partial(_attention, name, *shape, causal=causal, window=window))
    attempt("grouped_mm", _grouped_mm)
    attempt("linear_cross_entropy", _cross_entropy)
    attempt("experts", _experts)
    attempt("router", _router)
    attempt("random numbers", _random_numbers)
    for deterministic in (False, True):
        attempt("same bits twice", partial(_same_bits, deterministic=deterministic))


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16().requires_grad_()


def _off(name: str, ours: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Row:
    """The largest relative error of the result and of each gradient against the reference in float64."""
    found = ours(*inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = reference(*wide)
    slope = torch.randn_like(found)
    mine = (found.detach(), *torch.autograd.grad(found, inputs, slope))
    theirs = (wanted.detach(), *torch.autograd.grad(wanted, wide, slope.to(wanted.dtype)))
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, theirs, strict=True)]
    worst = max(errors) if all(e == e for e in errors) else None
    how = "|found - float64| / |float64|, the worst of result and gradients, bfloat16 inputs; peer: of each"
    peer = " ".join(f"{e:.1e}" for e in errors)
    return row(name, worst, "", goal=HALF, peer=peer, valid=worst is not None, how=how)


def _attention(name: str, H: int, G: int, K: int, *, causal: bool, window: int | None) -> Row:
    documents = on_device(Documents.of(torch.tensor([0] * 100 + [1] * 300 + [2] * (_T - 400))), "cuda")
    ours = partial(attention, segments_T=documents, causal=causal, window=window)
    reference = partial(attention_reference, segments_T=documents.ids_T, causal=causal, window=window)
    return _off(name, ours, reference, [_random(_T, H, K), _random(_T, G, K), _random(_T, G, K)])


def _grouped_mm() -> Row:
    ends_E = torch.tensor([0, 120, 250, 300], dtype=torch.int32, device="cuda")
    inputs = [_random(300, 64), _random(4, 64, 128)]
    reference = partial(grouped_mm_reference, offsets_E=ends_E)
    return _off("grouped_mm", partial(grouped_mm, offsets_E=ends_E), reference, inputs)


def _cross_entropy() -> Row:
    labels_T = torch.randint(0, 1000, (700,), device="cuda")
    labels_T[::7] = -100

    def ours(x_TD: Tensor, w_DV: Tensor) -> Tensor:
        return linear_cross_entropy(x_TD, w_DV, labels_T)

    def reference(x_TD: Tensor, w_DV: Tensor) -> Tensor:
        return linear_cross_entropy_reference(x_TD, w_DV, labels_T)

    return _off("linear_cross_entropy", ours, reference, [_random(700, 64), _random(64, 1000)])


def _experts() -> Row:
    expert_TK = torch.randint(0, 4, (200, 2), device="cuda")
    weights_TK = torch.rand(200, 2, device="cuda").requires_grad_()
    inputs = [_random(200, 64), weights_TK, _random(4, 64, 32), _random(4, 64, 32), _random(4, 32, 64)]

    def ours(x_TD: Tensor, weights_TK: Tensor, *matrices: Tensor) -> Tensor:
        return experts_swiglu(x_TD, expert_TK, weights_TK, *matrices)

    def reference(x_TD: Tensor, weights_TK: Tensor, *matrices: Tensor) -> Tensor:
        return experts_swiglu(x_TD, expert_TK, weights_TK, *matrices, backend="reference")

    return _off("experts", ours, reference, inputs)


def _router() -> list[Row]:
    inputs = [_random(512, 256), _random(256, 64)]
    worst = _off("router", wide_mm, wide_mm_reference, inputs)
    wanted = wide_mm_reference(*(x.detach().double() for x in inputs))
    error = float((wide_mm(*inputs).detach().double() - wanted).norm() / wanted.norm())
    return [
        worst,
        row("router, scores", error, "", goal=1e-6, how="float32 sums of bfloat16 products, against float64"),
    ]


def _random_numbers() -> list[Row]:
    here, card = keys.key(3), keys.key(3, device="cuda")
    apart = sum(int((f(card, (1000,)).cpu() != f(here, (1000,))).sum()) for f in (keys.bits, keys.uniform))
    error = float((keys.normal(card, (1000,)).cpu() - keys.normal(here, (1000,))).abs().max())
    return [
        row("random bits that differ from the CPU's", apart, "of 2000", goal=0, how="words and uniform numbers"),
        row("normal numbers, off the CPU's", error, "", goal=1e-5, how="the largest difference of 1000"),
    ]


def _same_bits(*, deterministic: bool) -> Row:
    inputs = [_random(4096, 16, 128), _random(4096, 4, 128), _random(4096, 4, 128)]
    documents = on_device(Documents.of(torch.arange(4096) // 2048), "cuda")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        runs = [
            torch.autograd.grad(attention(*inputs, segments_T=documents).float().square().sum(), inputs)
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    same = [n for i, n in enumerate("qkv") if all(torch.equal(runs[0][i], run[i]) for run in runs)]
    name = f"attention's gradients that vary from run to run, {'deterministic' if deterministic else 'default'}"
    how = "of q, k and v, three runs on the same inputs; peer: those that do not"
    return row(name, 3 - len(same), "of 3", goal=0 if deterministic else None, peer="".join(same), how=how)
