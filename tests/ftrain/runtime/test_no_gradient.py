"""A jitted function called in the middle of somebody's own backward."""

import pytest
import torch

import ftrain


def loss(params, x):
    return (x @ params["w"]).square().mean()


def arguments():
    return {"w": torch.randn(4, 3, requires_grad=True)}, torch.randn(5, 4)


@pytest.mark.parametrize("calls", [1, 3])
def test_a_backward_through_a_jitted_loss_is_refused(calls):
    params, x = arguments()
    fast = ftrain.jit(loss)
    for _ in range(calls):
        value = fast(params, x)
    with pytest.raises(ValueError, match=r"loss is jitted, so its result has no gradient for backward\(\)"):
        (value + params["w"].sum()).backward()


def test_steps_on_parameters_that_want_gradients_go_round_without_a_history():
    params, x = arguments()

    def step(params, x):
        value, grads = ftrain.value_and_grad(loss)(params, x)
        return ftrain.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    fast = ftrain.jit(step)
    for _ in range(3):
        params, value = fast(params, x)
    behind = [edge for edge, _ in params["w"].grad_fn.next_functions if edge is not None]
    assert [type(edge).__name__ for edge in behind] == ["AccumulateGrad"]
    assert float(value.detach()) == value.item()


def test_nothing_is_wrapped_where_no_gradient_is_wanted():
    params, x = arguments()
    fast = ftrain.jit(loss)
    with torch.no_grad():
        assert not fast(params, x).requires_grad
    assert not fast(ftrain.tree.map(torch.Tensor.detach, params), x).requires_grad
