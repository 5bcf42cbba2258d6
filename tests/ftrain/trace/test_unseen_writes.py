"""In-place ops of a loss: gradients are those of plain autograd, or the op is refused with its line."""

import pytest
import torch
from torch import Tensor

import ftrain
from ftrain.modules.spec import ParamSpec, fan_in
from ftrain.sharding import Layout, Mesh, Plan

K = torch.linspace(1.0, 2.0, 9, dtype=torch.float64)


def weighed(x: Tensor) -> Tensor:
    flat = x.reshape(-1).square()
    return (flat * K[: len(flat)]).sum()


def a_view_of_rows(h):
    v = h[:3]
    h.t_()
    return weighed(v)


def a_view_and_its_base(h):
    v = h[:2]
    h.unsqueeze_(0)
    return weighed(v) + weighed(h)


def a_transposed_view(h):
    v = h.t()
    h.transpose_(0, 1)
    return weighed(v)


def another_name(h):
    v = h[:2]
    h.swapaxes_(0, 1)
    return weighed(v)


def new_strides(h):
    v = h[:2]
    h.as_strided_((3, 3), (1, 3))
    return weighed(v)


def a_write_through_a_turned_view(h):
    v = h[:]
    v.t_()
    v.mul_(2.0)
    return weighed(h)


def a_write_beneath_a_turned_view(h):
    v = h[:]
    v.t_()
    h.mul_(2.0)
    return weighed(v)


REFUSED = [
    a_view_of_rows,
    a_view_and_its_base,
    a_transposed_view,
    another_name,
    new_strides,
    a_write_through_a_turned_view,
    a_write_beneath_a_turned_view,
]


def without_views(h):
    h.t_()
    return weighed(h)


def with_a_view_that_is_gone(h):
    s = h[:2].sum()
    h.unsqueeze_(0)
    return weighed(h) * s


def with_views_of_a_copy(h):
    v = h.detach()[:2]
    h.t_()
    return weighed(h) + v.sum()


def views_and_writes_afterwards(h):
    h.t_()
    v = h[:2]
    h.mul_(2.0)
    return weighed(v)


def a_view_itself(h):
    v, u = h[:2], h[1:]
    v.t_()
    return weighed(v) + weighed(u) + weighed(h)


RIGHT = [
    without_views,
    with_a_view_that_is_gone,
    with_views_of_a_copy,
    views_and_writes_afterwards,
    a_view_itself,
]


def arrays() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)


def by_autograd(end) -> Tensor:
    w, x = arrays()
    w.requires_grad_()
    return torch.autograd.grad(end(x * w), w)[0]


@pytest.mark.parametrize("end", RIGHT, ids=lambda f: f.__name__)
def test_shapes_changed_in_place_where_autograd_follows(end):
    found = ftrain.jit(ftrain.grad(lambda w, x: end(x * w)))(*arrays())
    torch.testing.assert_close(found, by_autograd(end))


@pytest.mark.parametrize("end", REFUSED, ids=lambda f: f.__name__)
def test_a_gradient_that_would_be_wrong_is_refused(end):
    step = ftrain.grad(lambda w, x: end(x * w))
    with pytest.raises(ValueError, match=rf"test_unseen_writes.py:\d+ \({end.__name__}\): .*_ .*within a loss.*make"):
        ftrain.jit(step)(*arrays())
    torch.testing.assert_close(step(*arrays()), by_autograd(end))  # eagerly torch.func knows the views' own strides


@pytest.mark.parametrize("end", [*RIGHT, *REFUSED], ids=lambda f: f.__name__)
def test_outside_of_gradients_all_is_right(end):
    w, x = arrays()
    torch.testing.assert_close(ftrain.jit(lambda w, x: end(x * w))(w, x), end(x * w))


@pytest.mark.parametrize("end", [*RIGHT, *REFUSED], ids=lambda f: f.__name__)
def test_gradients_by_torch_func_in_a_step_are_right(end):
    found = ftrain.jit(torch.func.grad(lambda w, x: end(x * w)))(*arrays())
    torch.testing.assert_close(found, by_autograd(end))


def test_a_constant_that_is_turned_and_then_written_with_a_gradient():
    def loss(w, x):
        h = x.clone()
        v = h[:2]
        h.t_()
        h.mul_(w)
        return weighed(v)

    with pytest.raises(ValueError, match=r"\(loss\): mul_ writes within a loss.*t_ at .*x = x.mul\(...\)"):
        ftrain.jit(ftrain.grad(loss))(*arrays())


def test_a_constant_that_is_turned_may_have_views():
    def loss(w, x):
        h = x.clone()
        v = h[:2]
        h.t_()
        return weighed(h * w) + weighed(v)

    w, x = arrays()
    torch.testing.assert_close(ftrain.jit(ftrain.grad(loss))(w, x), torch.func.grad(loss)(w, x))


@pytest.mark.parametrize("options", ["mesh", "cast"])
def test_a_write_into_the_copy_of_a_parameter_is_refused_as_into_the_parameter(options):
    def loss(params, batch):
        with torch.no_grad():
            params["w"].data.clamp_(-0.1, 0.1)
        return ftrain.Mean.of((batch["x"] * params["w"]).square())

    specs = {"w": ParamSpec((4,), (None,), fan_in(4))}
    mesh = {"plan": Plan(Mesh(shard=2, kind="virtual"), Layout(parameters=("shard",))), "specs": specs}
    how = {"mesh": mesh, "cast": {"precision": ftrain.Precision(compute="bfloat16")}}[options]
    step = ftrain.jit(lambda params, batch: ftrain.value_and_grad(loss)(params, batch), **how)
    with pytest.raises(ValueError, match=r"test_unseen_writes.py:\d+ .*clamp_ writes into the parameter '(params.)?w'"):
        step(ftrain.init(specs, ftrain.key(0)), {"x": torch.ones(8, 4)})
