"""Flow matching on normal data, whose best field and its loss are known; what a sample's rows share."""

import math

import pytest
import torch

import ftrain
from ftrain import Mean
from ftrain.kernels import random
from ftrain.modules.spec import ParamSpec, zeros
from ftrain.modules.velocity import guided, holding
from ftrain.sharding import Mesh, Plan
from ftrain.tasks.flow import Flow, Times, dropped, squared_error, uniform_of
from tests.helpers.gaussian_flow import Gaussian

KEY = random.key(3)
DATA = Gaussian(0.7, 0.5)
EVENLY = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
KINDS = {
    "uniform": Times(),
    "shift": Times(shift=5.0),
    "logit_normal": Times("logit_normal", mean=0.4, std=1.3, shift=2.0),
    "mode": Times("mode", scale=1.2),
    "expert": Times("logit_normal", shift=3.0, low=0.875, high=1.0),
    "middle": Times("mode", scale=-0.8, shift=0.5, low=0.1, high=0.6),
}


@pytest.mark.parametrize("name", KINDS)
def test_times_lie_where_their_distribution_says(name):
    times = KINDS[name]
    found = times.at(EVENLY)
    assert times.low <= found.min()
    assert found.max() <= times.high
    assert (found.diff() > 0).all()
    inside = times.share_below(times.high) - times.share_below(times.low)
    for time in torch.linspace(times.low, times.high, 7).tolist()[1:-1]:
        expected = (times.share_below(time) - times.share_below(times.low)) / inside
        assert abs(float((found < time).double().mean()) - expected) < 1e-3


def test_a_logit_normal_and_a_mode_are_those_of_stable_diffusion_3():
    normal = torch.special.ndtri(EVENLY)
    torch.testing.assert_close(Times("logit_normal", 0.4, 1.3).at(EVENLY), torch.sigmoid(0.4 + 1.3 * normal))
    u = 1 - EVENLY  # which grows as theirs falls
    theirs = 1 - u - 1.2 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    torch.testing.assert_close(Times("mode", scale=1.2).at(EVENLY), theirs)


def test_the_best_field_has_the_loss_of_what_cannot_be_known():
    """At fixed times, and on average over times drawn, with a weight."""
    data, ids_N = DATA.sample(40_000, 4), torch.arange(40_000)
    found = Flow().evaluate(DATA.velocity, data, ids_N=ids_N, key=KEY)
    assert {name: mean.item() for name, mean in found.items()} == pytest.approx(
        {name: DATA.loss(float(name)) for name in found}, rel=0.02
    )
    for weighting in ("none", "bell", "cosmap"):
        flow = Flow(Times("logit_normal"), weighting)
        weight = flow.weight(KINDS["uniform"].at(EVENLY)) if weighting != "none" else torch.ones(())
        times = flow.times.at(EVENLY)
        weight = torch.ones(()) if weighting == "none" else flow.weight(times)
        expected = (weight * DATA.loss(times)).mean().item()
        assert flow.loss(DATA.velocity, data, ids_N=ids_N, key=KEY).item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("weighting", ["bell", "cosmap"])
def test_weights_of_all_times_are_one_on_average(weighting):
    assert Flow(weighting=weighting).weight(EVENLY).mean().item() == pytest.approx(1, abs=1e-5)


def test_rows_of_a_sample_have_one_time_and_one_fate_wherever_they_lie():
    ids_N = torch.tensor([5, 5, 5, 9, 9, 7])
    noisy = Flow().noisy(torch.zeros(6, 2), ids_N=ids_N, key=KEY)
    assert len(set(noisy.time_N.tolist())) == 3
    part = Flow().noisy(torch.zeros(3, 2), ids_N=ids_N[2:5], key=KEY)
    assert torch.equal(part.time_N, noisy.time_N[2:5])
    many = torch.arange(20_000)
    share = dropped(KEY, many, 0.1).double().mean().item()
    assert share == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped(KEY, ids_N, 0.5)[:3], dropped(KEY, ids_N, 0.5)[:1].expand(3))
    assert uniform_of(KEY, many).min() > 0
    assert uniform_of(KEY, many).max() < 1
    correlation = torch.corrcoef(torch.stack([uniform_of(KEY, many), uniform_of(KEY, many + 1)]))[0, 1]
    assert abs(correlation) < 0.03


def test_input_and_target_have_one_noise():
    data = DATA.sample(50, 3)
    noisy = Flow().noisy(data, ids_N=torch.arange(50), key=KEY)
    torch.testing.assert_close(noisy.x - noisy.time_N[:, None] * noisy.target, data, rtol=1e-6, atol=1e-6)


def test_given_frames_are_data_at_time_zero_outside_of_the_loss():
    given_N = torch.tensor([True, False, False, True])
    data = DATA.sample(4, 2)
    asked = []

    def field(x, time_N):
        asked.append((x, time_N))
        return torch.where(given_N[:, None], torch.nan, x)  # what it says of given rows is never read

    loss = Flow().loss(field, data, ids_N=torch.tensor([0, 0, 1, 1]), key=KEY, given_N=given_N)
    ((x, time_N),) = asked
    assert torch.equal(x[given_N], data[given_N])
    assert not time_N[given_N].any()
    assert time_N[~given_N].all()
    noisy = Flow().noisy(data, ids_N=torch.tensor([0, 0, 1, 1]), key=KEY)
    torch.testing.assert_close(loss.value(), (noisy.x - noisy.target)[~given_N].square().mean())
    held = holding(DATA.velocity, given_N)(data, torch.full((4,), 0.5))
    assert not held[given_N].any()
    assert held[~given_N].all()


def test_padding_does_not_count_and_nan_in_it_harms_no_gradient():
    valid_N = torch.tensor([True, True, False])
    data = torch.tensor([[1.0], [2.0], [float("nan")]])

    def loss(w):
        return Flow().loss(lambda x, t: w * x, data, ids_N=torch.arange(3), key=KEY, valid_N=valid_N)

    value, grad = ftrain.value_and_grad(loss)(torch.tensor(0.5))
    assert value.isfinite()
    assert grad.isfinite()
    assert loss(torch.tensor(0.5)).count == 2


def test_guidance_is_the_standard_one():
    """On normal data with two conditions it moves the mean as far as the difference of velocities says."""
    told, untold = Gaussian(1.0, 0.5), Gaussian(0.0, 0.5)
    x, time_N = DATA.sample(3, 1), torch.full((3,), 0.5, dtype=torch.float64)
    field = guided(told.velocity, untold.velocity, 4.0)
    expected = untold.velocity(x, time_N) + 4 * (told.velocity(x, time_N) - untold.velocity(x, time_N))
    torch.testing.assert_close(field(x, time_N), expected)
    torch.testing.assert_close(guided(told.velocity, untold.velocity, 1.0)(x, time_N), told.velocity(x, time_N))


def flow_step(params, batch, key):
    """One loss with its gradient, of a linear field over packed rows."""

    def loss(params, batch):
        ids_N = batch["ids"]

        def field(x, time_N):
            return x @ params["w"] + time_N[:, None].to(x.dtype) * torch.where(dropped(key, ids_N, 0.3), 0, 1)[:, None]

        return Flow(Times("logit_normal")).loss(field, batch["data"], ids_N=ids_N, key=key, given_N=batch["given"])

    return ftrain.value_and_grad(loss)(params, batch)


@pytest.mark.parametrize("mesh", [{"shard": 2}, {"shard": 2, "sequence": 2}])
def test_a_mesh_draws_the_same_times_noise_and_drops(mesh):
    params = {"w": DATA.sample(2, 2, seed=1)}
    batch = {
        "data": DATA.sample(8, 2), "ids": torch.tensor([0, 0, 0, 1, 2, 2, 3, 3]),
        "given": torch.tensor([True, False, False, False, True, False, False, False]),
    }  # fmt: skip
    value, grads = flow_step(params, batch, KEY)
    specs = {"w": ParamSpec((2, 2), ("embed", "mlp"), zeros())}
    step = ftrain.jit(flow_step, plan=Plan(Mesh(**mesh, kind="virtual")), specs={"params": specs})
    found, found_grads = step(params, batch, KEY)
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(found_grads, grads)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="is not one of uniform, logit_normal, mode"):
        Times("cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"low=0.9 and high=0.2 must be in order"):
        Times(low=0.9, high=0.2)
    with pytest.raises(ValueError, match=r"'sigma_sqrt' is t \*\* -2, which has no mean"):
        Flow(weighting="sigma_sqrt")
    with pytest.raises(ValueError, match=r"ids_N is torch.int64 \[1\], expected int64 \[2\]"):
        Flow().loss(DATA.velocity, torch.zeros(2, 1), ids_N=torch.zeros(1, dtype=torch.int64), key=KEY)
    with pytest.raises(ValueError, match=r"given_N is torch.float32"):
        Flow().loss(DATA.velocity, torch.zeros(2, 1), ids_N=torch.arange(2), key=KEY, given_N=torch.zeros(2))
    with pytest.raises(ValueError, match="a field gave"):
        squared_error(torch.zeros(2, 1), torch.zeros(2, 2))
    assert isinstance(squared_error(torch.zeros(2, 1), torch.zeros(2, 1)), Mean)
