"""FLOPs and bytes of a graph."""

import pytest
import torch
import torch.nn.functional as F

from ftrain import TrainState, optim
from ftrain.analysis.flops import has_flops, is_product
from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
from ftrain.kernels.mean import Mean
from ftrain.plan.jit import jit
from ftrain.trace.accumulate import accumulate
from ftrain.trace.grad import grad
from tests.helpers.momentum_steps import momentum_state, momentum_step, stack_batch, stack_loss, stack_params


def test_products_by_phase():
    cost = jit(momentum_step(stack_loss)).lower(momentum_state(stack_params(3)), stack_batch(8)).cost()
    product = 2 * 8 * 16 * 16
    assert cost.by_phase == {"step": 0, "forward": 3 * product, "backward": 5 * product}
    assert cost.flops == 8 * product
    assert cost.flops == sum(n.flops for n in cost.nodes)
    assert cost.bytes == sum(n.bytes for n in cost.nodes)


@pytest.mark.parametrize("remat", ["none", "layer", "all"])
@pytest.mark.parametrize("rule", [optim.sgd(0.1), optim.muon(0.1, ns_dtype=torch.float32)])
def test_the_model_costs_the_same_whatever_is_recomputed_and_optimized(remat, rule):
    """A utilisation that counted recompute would rise where a run gets slower."""
    params, x = {"layers": [{"w": torch.randn(16, 16)} for _ in range(3)]}, torch.randn(8, 16)

    def loss(params, x):
        for layer in params["layers"]:
            x = torch.tanh(x @ layer["w"])
        return Mean.of(x.square())

    def step(state, x):
        return state.apply(rule, grad(loss)(state.params, x))

    cost = jit(step, remat=remat).lower(TrainState.create(params, rule), x).cost()
    assert cost.model_flops == (3 + 5) * 2 * 8 * 16 * 16
    assert (cost.flops > cost.model_flops) == (remat != "none" or cost.by_phase["step"] > 0)


def test_bytes_are_read_and_written_once_and_views_move_none():
    cost = jit(lambda x, y: (y + x.t()).view(-1)).lower(torch.ones(4, 4), torch.ones(4, 4)).cost()
    assert {n.op: n.bytes for n in cost.nodes if n.bytes} == {"aten.add.Tensor": 3 * 64}


def test_rounds_of_a_loop_count():
    x, y = stack_batch(8)
    state = momentum_state(stack_params(3))
    whole = jit(momentum_step(stack_loss)).lower(state, (x, y)).cost()
    split = (
        jit(momentum_step(accumulate(stack_loss, 4, stacked=True)))
        .lower(state, (x.reshape(4, 2, 16), y.reshape(4, 2, 16)))
        .cost()
    )
    assert split.flops == whole.flops


def test_convolutions_and_kernels_count():
    image, w = torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3)
    assert jit(lambda x, w: F.conv2d(x, w)).lower(image, w).cost().flops == 2 * 2 * 5 * 6 * 6 * 3 * 9
    x, head, labels = torch.ones(10, 4), torch.ones(4, 7), torch.zeros(10, dtype=torch.int64)
    assert jit(linear_cross_entropy).lower(x, head, labels).cost().flops == 2 * 10 * 4 * 7


def test_products_of_groups_count_as_those_of_all_their_rows():
    """Whichever dim the groups cut: of the rows, of the columns, and the one that both matrices share."""
    x, w, dy = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((40, 16), (3, 16, 8), (40, 8)))
    offsets = torch.tensor([8, 16, 40], dtype=torch.int32)

    def products(x, w, dy, offsets):
        columns = torch._grouped_mm(w.transpose(1, 2), x.t(), offs=offsets)
        return torch._grouped_mm(x, w, offs=offsets), columns, torch._grouped_mm(x.t(), dy, offs=offsets)

    cost = jit(products).lower(x, w, dy, offsets).cost()
    assert [n.flops for n in cost.nodes if n.op == "aten._grouped_mm.default"] == [2 * 40 * 16 * 8] * 3


def test_a_product_without_a_rule_is_said_to_have_none():
    a, b, w = torch.ones(5, 4), torch.ones(5, 3), torch.ones(2, 4, 3)
    assert jit(lambda a, b, w: F.bilinear(a, b, w)).lower(a, b, w).cost().unpriced == ("aten::_trilinear",)
    assert jit(lambda a, b: a.t() @ b).lower(a, b).cost().unpriced == ()


def test_a_product_is_known_by_its_name():
    aten = torch.ops.aten
    products = (aten.mm.default, aten.mm.dtype_out, aten.addmm.out, aten.baddbmm.default, aten.convolution.default,
                aten._flash_attention_forward.default, aten._grouped_mm.default, aten.mv.default, aten.dot.default,
                aten._scaled_mm.default, aten._scaled_dot_product_flash_attention_for_cpu.default)  # fmt: skip
    assert all(is_product(op) for op in products)
    assert all(has_flops(op) for op in products)
    others = (aten.lgamma.default, aten.upsample_bilinear2d.default, aten.linalg_vector_norm.default,
              aten._to_copy.default, aten.native_layer_norm.default, aten.index_add.default)  # fmt: skip
    assert not any(is_product(op) for op in others)
