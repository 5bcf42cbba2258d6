"""FLOPs and bytes of a graph."""

import torch
import torch.nn.functional as F
from momentum_steps import momentum_state, momentum_step, stack_batch, stack_loss, stack_params

from ftrain.accumulate import accumulate
from ftrain.jit import jit
from kernels.linear_cross_entropy import linear_cross_entropy


def test_products_by_phase():
    cost = jit(momentum_step(stack_loss)).lower(momentum_state(stack_params(3)), stack_batch(8)).cost()
    product = 2 * 8 * 16 * 16
    assert cost.by_phase == {"step": 0, "forward": 3 * product, "backward": 5 * product}
    assert cost.flops == 8 * product
    assert cost.flops == sum(n.flops for n in cost.nodes)
    assert cost.bytes == sum(n.bytes for n in cost.nodes)


def test_bytes_are_read_and_written_once_and_views_move_none():
    cost = jit(lambda x, y: (y + x.t()).view(-1)).lower(torch.ones(4, 4), torch.ones(4, 4)).cost()
    assert {n.op: n.bytes for n in cost.nodes if n.bytes} == {"aten.add.Tensor": 3 * 64}


def test_rounds_of_a_loop_count():
    x, y = stack_batch(8)
    state = momentum_state(stack_params(3))
    whole = jit(momentum_step(stack_loss)).lower(state, (x, y)).cost()
    split = (
        jit(momentum_step(accumulate(stack_loss, 4))).lower(state, (x.reshape(4, 2, 16), y.reshape(4, 2, 16))).cost()
    )
    assert split.flops == whole.flops


def test_convolutions_and_kernels_count():
    image, w = torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3)
    assert jit(lambda x, w: F.conv2d(x, w)).lower(image, w).cost().flops == 2 * 2 * 5 * 6 * 6 * 3 * 9
    x, head, labels = torch.ones(10, 4), torch.ones(4, 7), torch.zeros(10, dtype=torch.int64)
    assert jit(linear_cross_entropy).lower(x, head, labels).cost().flops == 2 * 10 * 4 * 7
