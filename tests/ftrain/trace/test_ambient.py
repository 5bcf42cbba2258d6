"""What lies around a call is part of its key, or the same at both ends; in a transform a step is the plain function."""

import pytest
import torch

import ftrain


def loss(params, x):
    return (x @ params["w"]).tanh().square().mean()


def step(params, x):
    value, grads = ftrain.value_and_grad(loss)(params, x)
    return {"w": params["w"] - 0.1 * grads["w"]}, value


def inputs():
    return {"w": torch.randn(4, 3)}, torch.randn(5, 4)


GRADIENTS = {
    "ftrain.grad": ftrain.grad,
    "torch.func.grad": torch.func.grad,
    "jit of grad": lambda f: ftrain.jit(ftrain.grad(f)),
    "jit of torch's grad": lambda f: ftrain.jit(torch.func.grad(f)),
    "of the sum over rows": lambda f: (
        lambda p, x: ftrain.grad(lambda p: torch.func.vmap(lambda row: f(p, row))(x).mean())(p)
    ),
}


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("transform", GRADIENTS.values(), ids=GRADIENTS)
def test_the_gradient_of_a_jitted_function(transform, called_before):
    params, x = inputs()
    fast = ftrain.jit(loss)
    if called_before:
        fast(params, x)
    torch.testing.assert_close(transform(fast)(params, x), transform(loss)(params, x))


def test_jit_in_jit():
    params, x = inputs()
    torch.testing.assert_close(ftrain.jit(lambda p, x: ftrain.jit(step)(p, x))(params, x), step(params, x))


def test_forward_mode_and_vmap():
    params, x = inputs()
    fast = ftrain.jit(loss)
    fast(params, x)
    tangent = torch.randn_like(x)
    ours = torch.func.jvp(lambda x: fast(params, x), (x,), (tangent,))
    torch.testing.assert_close(ours, torch.func.jvp(lambda x: loss(params, x), (x,), (tangent,)))
    rows = torch.randn(2, 5, 4)
    torch.testing.assert_close(
        torch.func.vmap(fast, (None, 0))(params, rows), torch.func.vmap(loss, (None, 0))(params, rows)
    )


AROUND = {
    "nothing": lambda: torch.enable_grad(),
    "no_grad": lambda: torch.no_grad(),
    "inference_mode": lambda: torch.inference_mode(),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "a default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("donate", [None, "params"])
@pytest.mark.parametrize("second", AROUND)
@pytest.mark.parametrize("first", AROUND)
@pytest.mark.filterwarnings("ignore:step is traced again")
def test_modes_around_calls(first, second, donate):
    ours, theirs, x = *(inputs()[0] for _ in range(2)), inputs()[1]
    ours["w"].copy_(theirs["w"])
    jitted = ftrain.jit(step, donate=donate)
    for name in (first, second, first, "nothing"):
        with AROUND[name]():
            ours, value = jitted(ours, x)
        with torch.enable_grad() if name == "inference_mode" else AROUND[name]():  # it changes no number
            expected = step(theirs, x)
            theirs = {"w": expected[0]["w"].clone()}
        assert value.dtype == expected[1].dtype
        assert not ours["w"].is_inference()
        torch.testing.assert_close((ours, value), expected)


def test_the_default_dtype_is_part_of_the_key():
    scaled = ftrain.jit(lambda x: x * torch.ones(()).to(x) + torch.zeros(2).sum())
    assert scaled(torch.ones(2)).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.warns(UserWarning, match="the default dtype around the call"):
            assert scaled(torch.ones(2, dtype=torch.float32)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert scaled.traces == 2


@pytest.mark.filterwarnings("ignore:<lambda> is traced again")
def test_traces_have_an_end():
    double = ftrain.jit(lambda x: x * 2)
    for n in range(1, 9):
        assert double(torch.ones(n)).tolist() == [2.0] * n
    with pytest.warns(UserWarning, match="holds 8 traces and drops the oldest"):
        double(torch.ones(9))
    assert double(torch.ones(1)).tolist() == [2.0]
    assert double.traces == 8
