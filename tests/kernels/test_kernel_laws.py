"""What holds for every kernel with a fast version: it is its reference, it differentiates, it composes, it traces."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ftrain.kernels.embedding import embedding, merge_rows
from ftrain.kernels.experts import experts as all_experts
from ftrain.kernels.experts import experts_swiglu
from ftrain.kernels.grouped_mm import grouped_mm
from ftrain.kernels.layer_norm import layer_norm
from ftrain.kernels.memory_scan import memory_scan
from ftrain.kernels.moe import combine, moe_dispatch
from ftrain.kernels.rms_norm import rms_norm
from ftrain.kernels.rope import rope, rope_table
from ftrain.kernels.swiglu import swiglu
from tests.helpers.expert_networks import biased, biased_shapes


class Case(NamedTuple):
    """A kernel as a function of its differentiable tensors, whose shapes are given; the rest of its inputs; its ops."""

    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    rest: tuple[Tensor, ...] = ()
    fast: str = "cpu"
    ops: tuple[str, ...] = ()


def dispatched(x, expert, *, backend):
    return moe_dispatch(x, expert, num_experts=4, backend=backend)[0]


def combined(rows, weights, expert, *, backend):
    _, dispatch = moe_dispatch(rows.new_zeros(expert.shape[0], 1), expert, num_experts=4)
    return combine(rows, weights, dispatch, backend=backend)


def experts(x, weights, w_gate, w_up, w_down, expert, *, backend):
    return experts_swiglu(x, expert, weights, w_gate, w_up, w_down, backend=backend)


def any_experts(x, weights, scale, *rest, backend):
    *leaves, expert = rest
    network = "reference" if backend == "reference" else "auto"
    return all_experts(x, expert, weights, leaves, biased(scale, backend=network), backend=backend)


def turned(layout):
    def call(x, positions, *, backend):
        cos, sin = rope_table(positions, head_dim=4, dtype=x.dtype)
        return rope(x, cos, sin, layout=layout, backend=backend)

    return call


POSITIONS = torch.tensor([0, 3, 1, 7, 2])
EXPERTS = torch.tensor([[0, 2], [2, 2], [3, 0], [2, 0], [0, 3]])
OFFSETS = torch.tensor([2, 2, 5, 7], dtype=torch.int32)
INDEX = torch.tensor([4, 1, 5, 5])

CASES = {
    "rms_norm": Case(rms_norm, ((5, 3, 6), (6,)), ops=("rms_norm", "rms_norm_backward")),
    "rms_norm, no weight": Case(lambda x, *, backend: rms_norm(x, backend=backend), ((5, 6),)),
    "layer_norm": Case(layer_norm, ((5, 3, 6), (6,), (6,)), fast="aten"),
    "layer_norm, no bias": Case(
        lambda x, w, *, backend: layer_norm(x, w, backend=backend), ((5, 6), (6,)), fast="aten"
    ),
    "swiglu": Case(swiglu, ((5, 6), (5, 6)), ops=("swiglu", "swiglu_backward")),
    "rope, half": Case(turned("half"), ((5, 2, 4),), (POSITIONS,), ops=("rope", "rope")),
    "rope, interleaved": Case(turned("interleaved"), ((5, 2, 4),), (POSITIONS,), ops=("rope", "rope")),
    "rope, partial": Case(turned("half"), ((5, 2, 7),), (POSITIONS,)),
    "rope, interleaved, partial": Case(turned("interleaved"), ((5, 2, 7),), (POSITIONS,)),
    "dispatch": Case(dispatched, ((5, 3),), (EXPERTS,), fast="sorted", ops=("combine",)),
    "combine": Case(combined, ((10, 3), (5, 2)), (EXPERTS,), fast="sorted", ops=("combine", "combine_backward")),
    "grouped_mm": Case(
        grouped_mm,
        ((7, 3), (4, 3, 2)),
        (OFFSETS,),
        fast="loop",
        ops=("grouped_mm", "grouped_mm_backward_x", "grouped_mm_backward_w"),
    ),
    "experts": Case(experts, ((5, 3), (5, 2), (4, 3, 2), (4, 3, 2), (4, 2, 3)), (EXPERTS,), fast="loop"),
    "experts of any network": Case(
        any_experts, ((5, 3), (5, 2), (3,), *biased_shapes(4, 3, 2)), (EXPERTS,), fast="sorted"
    ),
    "embedding": Case(
        lambda table, tokens, *, backend: embedding(tokens, table, backend=backend),
        ((9, 3),),
        (POSITIONS,),
        ops=("embedding", "embedding_backward"),
    ),
    "memory_scan": Case(
        memory_scan,
        ((1, 1, 3), (1, 1, 3, 2, 3), (1, 1, 3, 2, 3), (1, 1, 3, 3, 1)),
        fast="loop",
        ops=("memory_scan", "memory_scan"),
    ),
    "merge_rows": Case(merge_rows, ((5, 3), (4, 3)), (INDEX,), ops=("merge_rows", "merge_rows_backward")),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


def inputs(case: Case, *, requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.shapes)
    return [x.requires_grad_(requires_grad) for x in made]


def scalar(case: Case, backend: str = "auto") -> Callable[..., Tensor]:
    """A loss that is not linear, so that the incoming gradient depends on the output."""
    return lambda *xs: case.call(*xs, backend=backend).pow(3).sum()


def gradients(f: Callable[..., Tensor], xs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.func.grad(f, tuple(range(len(xs))))(*xs)


def with_rest(case: Case, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *xs: f(*xs, *case.rest)


def test_is_its_reference(case):
    xs = inputs(case)
    torch.testing.assert_close(
        case.call(*xs, *case.rest, backend=case.fast), case.call(*xs, *case.rest, backend="reference")
    )


def test_auto_is_the_fast_version(case):
    xs = inputs(case)
    assert torch.equal(case.call(*xs, *case.rest, backend="auto"), case.call(*xs, *case.rest, backend=case.fast))


def test_gradient(case):
    xs = inputs(case, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *xs: case.call(*xs, *case.rest, backend=case.fast), xs)


def test_gradient_of_a_gradient_of_the_reference(case):
    xs = inputs(case, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *xs: case.call(*xs, *case.rest, backend="reference"), xs)


def squared_gradient(case: Case, backend: str) -> Callable[..., Tensor]:
    return lambda *xs: sum(g.square().sum() for g in gradients(with_rest(case, scalar(case, backend)), list(xs)))


def test_nested_gradient_is_right_or_an_error(case):
    xs = inputs(case)
    expected = gradients(squared_gradient(case, "reference"), xs)
    torch.testing.assert_close(gradients(squared_gradient(case, "auto"), xs), expected)
    try:
        explicit = gradients(squared_gradient(case, case.fast), xs)
    except NotImplementedError:
        return
    torch.testing.assert_close(explicit, expected)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "combine", "grouped_mm", "embedding", "merge_rows"])
def test_a_missing_second_derivative_says_what_to_do(name):
    case = CASES[name]
    with pytest.raises(NotImplementedError, match=f"{name} has no second derivative .* backend='reference'"):
        gradients(squared_gradient(case, case.fast), inputs(case))


def test_eager_autograd_never_drops_a_second_derivative(case):
    xs = inputs(case, requires_grad=True)
    first = torch.autograd.grad(scalar(case)(*xs, *case.rest), xs, create_graph=True)
    try:
        second = torch.autograd.grad(sum(g.square().sum() for g in first), xs)
    except NotImplementedError:
        return
    torch.testing.assert_close(second, gradients(squared_gradient(case, "reference"), inputs(case)))


def test_per_sample_gradients(case):
    xs = inputs(case)
    batched = [torch.stack([x, 2 * x, x - 1]) for x in xs]
    grad = torch.func.grad(scalar(case), tuple(range(len(xs))))
    dims = (0,) * len(xs) + (None,) * len(case.rest)
    found = torch.func.vmap(grad, in_dims=dims)(*batched, *case.rest)
    for i in range(3):
        expected = gradients(with_rest(case, scalar(case)), [b[i] for b in batched])
        torch.testing.assert_close([g[i] for g in found], list(expected))


def test_forward_mode(case):
    xs = inputs(case)
    tangents = [torch.ones_like(x) for x in xs]
    f = with_rest(case, scalar(case))
    _, directional = torch.func.jvp(f, tuple(xs), tuple(tangents))
    torch.testing.assert_close(directional, sum(g.sum() for g in gradients(f, xs)))


def test_traces_on_shapes_alone_to_its_own_ops(case):
    xs = inputs(case)

    def step(*arguments):
        fixed = arguments[len(xs) :]
        return gradients(lambda *ys: scalar(case)(*ys, *fixed), list(arguments[: len(xs)]))

    graph = make_fx(step, tracing_mode="fake")(*xs, *case.rest)
    own = [node.target.__name__.removesuffix(".default") for node in graph.graph.nodes if "ftrain." in str(node.target)]
    if case.ops:
        assert sorted(own) == sorted(case.ops)
    assert all(torch.equal(a, b) for a, b in zip(graph(*xs, *case.rest), step(*xs, *case.rest), strict=True))


class Record(TorchDispatchMode):
    """Remembers the arguments of our own ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ftrain":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_shape_rules(case):
    """Fake outputs have the shapes, dtypes and strides of the real ones, also for strided and expanded inputs."""
    xs = [torch.cat([x, x], -1)[..., : x.shape[-1]].requires_grad_() for x in inputs(case)]
    with Record() as record:
        case.call(*xs, *case.rest, backend=case.fast).sum().backward()
    assert len(record.calls) >= len(case.ops)
    for op, arguments in record.calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_wide(case, dtype):
    """Result and gradients are those of float32 on the same numbers, up to the rounding of what passes between ops."""
    narrow = [x.to(dtype) for x in inputs(case)]
    wide = [x.float() for x in narrow]
    epsilon = torch.finfo(dtype).eps

    def close(a, b):
        torch.testing.assert_close(a.float(), b, rtol=8 * epsilon, atol=8 * epsilon * float(b.detach().abs().max()))

    def run(xs):
        leaves = [x.clone().requires_grad_() for x in xs]
        y = case.call(*leaves, *case.rest, backend=case.fast)
        return y, torch.autograd.grad(y.sum(), leaves)

    (y, grads), (y_wide, grads_wide) = run(narrow), run(wide)
    assert y.dtype == dtype
    assert all(g.dtype == dtype for g in grads)
    close(y, y_wide)
    for g, g_wide in zip(grads, grads_wide, strict=True):
        close(g, g_wide)
