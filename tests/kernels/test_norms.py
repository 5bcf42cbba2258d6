"""rms_norm, layer_norm and swiglu against torch's own, and their bad input."""

import pytest
import torch

from ftrain.kernels.layer_norm import layer_norm
from ftrain.kernels.rms_norm import rms_norm
from ftrain.kernels.swiglu import swiglu

BACKENDS = ["auto", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7,), (5, 8), (3, 4, 16), (700, 1000), (0, 4), (2, 1)])
def test_rms_norm_is_torchs(shape, backend):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    expected = torch.nn.functional.rms_norm(x, shape[-1:], weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, backend=backend), expected)
    torch.testing.assert_close(rms_norm(x, backend=backend), torch.nn.functional.rms_norm(x, shape[-1:], None, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_layer_norm_is_torchs(dtype, weights, backend):
    x = torch.randn(6, 3, 40).to(dtype)
    weight, bias = (torch.randn(40) if name in weights else None for name in ("weight", "bias"))
    expected = torch.nn.functional.layer_norm(x.float(), (40,), weight, bias, 1e-5)
    found = layer_norm(x, weight, bias, backend=backend)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_swiglu_is_silu_times_up(backend):
    gate, up = torch.randn(600, 700), torch.randn(600, 700)
    torch.testing.assert_close(swiglu(gate, up, backend=backend), gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_over_many_pieces(dtype):
    """More rows than one piece holds, read through the strides of a fused projection, with an expanded gradient."""
    wide = torch.randn(3000, 3 * 128).to(dtype)
    a, b = wide[:, :128], wide[:, 128:256]
    heads = wide.view(3000, 6, 64)[:, :4]
    weight, head_weight = torch.rand(128), torch.rand(64)
    calls = {
        "rms_norm": (rms_norm, (a, weight)),
        "rms_norm of heads": (rms_norm, (heads, head_weight)),
        "layer_norm": (layer_norm, (a, weight.to(dtype), b[0])),
        "swiglu": (swiglu, (a, b)),
    }
    for name, (kernel, inputs) in calls.items():
        leaves = [x.detach().requires_grad_() for x in inputs]
        found = torch.autograd.grad(kernel(*leaves).sum(), leaves)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        expected = torch.autograd.grad(kernel(*exact, backend="reference").sum(), exact)
        tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 2e-2}
        for g, e, x in zip(found, expected, inputs, strict=True):
            assert g.dtype == x.dtype, name
            torch.testing.assert_close(g, e.to(g.dtype), **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("scale", [1e-12, 1e4, 0.0])
def test_rms_norm_of_extreme_rows_is_finite(scale):
    x = (torch.randn(4, 32) * scale).requires_grad_()
    y = rms_norm(x, torch.ones(32))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(4)), r"weight \[4\] does not match the last dim of \[2, 3\]"),
        (lambda: rms_norm(torch.ones(2, 3, dtype=torch.int64)), "int64"),
        (lambda: rms_norm(torch.tensor(1.0)), r"float32 \[\]"),
        (lambda: rms_norm(torch.ones(2, 3), backend="fast"), "'fast' is not one of"),
        (lambda: layer_norm(torch.ones(2, 3), torch.ones(3), torch.ones(2)), r"bias \[2\] does not match"),
        (lambda: layer_norm(torch.ones(2, 3, dtype=torch.int64)), "int64"),
        (lambda: swiglu(torch.ones(2, 3), torch.ones(2, 4)), r"\[2, 3\] and up torch.float32 \[2, 4\]"),
        (lambda: swiglu(torch.ones(2), torch.ones(2, dtype=torch.bfloat16)), "bfloat16"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
