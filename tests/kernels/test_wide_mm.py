"""Products of bfloat16 matrices with float32 sums: the fast way computes what the casts compute, in every transform."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ftrain.kernels.wide_mm import wide_mm, wide_mm_reference
from ftrain.kernels.workspace import FLOPS, WORKSPACE
from ftrain.modules import moe
from ftrain.modules.moe import MoEConfig

N, D, F = 96, 64, 8
NARROW = torch.bfloat16


def factors(dtype=NARROW, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((N, D), (D, F)))
    return [x.requires_grad_() for x in made]


def off(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def run(call, inputs):
    """The result and both gradients, for a gradient that varies over six orders of magnitude."""
    y = call(*inputs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 0, y.shape[0])[:, None]
    return y, *torch.autograd.grad(y, inputs, dy.to(y))


def compare_with_float64(device):
    y, dx, dw = run(lambda x, w: wide_mm(x, w, backend="tensor_cores"), factors(device=device))
    wanted = run(wide_mm_reference, [x.detach().double().requires_grad_() for x in factors(device=device)])
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.float32, NARROW, NARROW)
    assert off(y, wanted[0]) < 1e-6
    assert off(dx, wanted[1]) < 4e-3
    assert off(dw, wanted[2]) < 4e-3


def test_sums_are_float32_and_gradients_are_rounded_once():
    compare_with_float64("cpu")


@pytest.mark.gpu
def test_on_a_gpu_sums_are_float32():
    compare_with_float64("cuda")
    x, w = factors(device="cuda")
    assert torch.equal(wide_mm(x, w), wide_mm(x, w, backend="tensor_cores"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_on_a_cpu_it_is_the_casts_to_the_bit(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    found = run(wide_mm, factors(dtype))
    wanted = run(lambda x, w: x.to(wide) @ w.to(wide), factors(dtype))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_other_dtypes_take_the_casts(dtype):
    found = run(lambda x, w: wide_mm(x, w, backend="tensor_cores"), factors(dtype))
    assert all(torch.equal(a, b) for a, b in zip(found, run(wide_mm_reference, factors(dtype)), strict=True))


def test_only_gradients_that_are_asked_for():
    x, w = factors()
    for inputs, wanted in (((x.detach(), w), w), ((x, w.detach()), x)):
        (found,) = torch.autograd.grad(wide_mm(*inputs, backend="tensor_cores").sum(), [wanted])
        assert found.shape == wanted.shape


def test_it_traces_to_its_op():
    def loss(x, w):
        return wide_mm(x, w, backend="tensor_cores").pow(2).sum()

    xs = [x.detach() for x in factors()]
    gradient = torch.func.grad(loss, (0, 1))
    graph = make_fx(gradient, tracing_mode="fake")(*xs)
    ops = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert ops.count("ftrain.wide_mm.default") == 2
    assert ops.count("aten.mm.default") == 1
    assert all(torch.equal(a, b) for a, b in zip(graph(*xs), gradient(*xs), strict=True))


def test_transforms_take_the_casts():
    x, w = (t.detach() for t in factors())
    xs = torch.stack([x, 2 * x])

    def loss(x, w):
        return wide_mm(x, w).square().mean()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(xs, w)
    assert torch.equal(per_sample[1], torch.func.grad(loss)(2 * x, w))
    _, slope = torch.func.jvp(loss, (x, w), (torch.ones_like(x), torch.zeros_like(w)))
    assert float(slope) == pytest.approx(float(torch.func.grad(loss)(x, w).float().sum()), rel=0.05)


def test_a_second_derivative_is_refused_where_there_is_none():
    def squared(x, w):
        dw = torch.func.grad(lambda w: wide_mm(x, w, backend="tensor_cores").pow(3).sum())(w)
        return dw.float().square().sum()

    with pytest.raises(NotImplementedError, match=r"wide_mm has no second derivative .* backend='reference'"):
        torch.func.grad(squared, 1)(*(x.detach() for x in factors()))


def test_shape_rule_flops_and_workspace(measure_memory):
    x, w = (t.detach() for t in factors())
    op = torch.ops.ftrain.wide_mm.default
    torch.library.opcheck(op, (x, w), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(op, (x.t(), x), test_utils=("test_schema", "test_faketensor"))
    assert FLOPS["ftrain::wide_mm"](x, w) == 2 * N * D * F
    assert measure_memory(lambda: op(x, w)).workspace == WORKSPACE["ftrain::wide_mm"](x, w)


@pytest.mark.parametrize(
    ("x", "w"), [((4, 3), (2, 5)), ((4,), (4, 5)), ((2, 4, 3), (3, 5))], ids=["inner", "vector", "batch"]
)
def test_shapes_that_do_not_fit_are_named(x, w):
    with pytest.raises(ValueError, match=r"wide_mm: x \[N, D\] and w \[D, F\] .* got .*float32"):
        wide_mm(torch.zeros(x), torch.zeros(w))


def test_a_router_chooses_by_float32_scores():
    """Two experts whose scores differ by less than bfloat16 tells apart."""
    x = torch.tensor([[1.0, 2.0**-10]], dtype=NARROW)
    w = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=NARROW)
    expert_TK, _, _ = moe.route(w, x, cfg=MoEConfig(2, 4, experts=2, top_k=1))
    assert expert_TK.tolist() == [[1]]
