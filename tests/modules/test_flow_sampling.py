"""Samplers of flow matching: against the exact flow of normal data, and UniPC against diffusers' own."""

import pytest
import torch

from ftrain.kernels import random
from ftrain.modules.flow_sampling import euler, few_steps, path, unipc
from ftrain.modules.velocity import clean, holding, shifted, timetable
from tests.helpers.gaussian_flow import Gaussian

DATA = Gaussian(0.7, 0.5)
NOISE = Gaussian().sample(50, 2)


def error(sampler, steps):
    times = timetable(steps, first=0.999)
    return float((sampler(DATA.velocity, NOISE, times) - DATA.path(NOISE, 0.999, 0.0)).abs().max())


def test_the_error_falls_as_the_order_of_a_sampler_says():
    assert error(euler, 20) / error(euler, 40) == pytest.approx(2, rel=0.15)
    assert error(unipc, 40) < error(euler, 40) / 10
    assert error(lambda *a: unipc(*a, order=3), 20) < error(euler, 20) / 10


@pytest.mark.parametrize(("steps", "order", "shift"), [(8, 2, 3.0), (6, 3, 5.0), (5, 1, 1.0), (1, 2, 1.0)])
def test_unipc_is_that_of_diffusers(steps, order, shift):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=order
    )
    theirs.set_timesteps(steps)
    times = tuple(theirs.sigmas.tolist())
    field = lambda x, t: torch.sin(3 * x) + t[:, None] * x  # noqa: E731  # a field that no order solves exactly
    x = NOISE
    for step, timestep in enumerate(theirs.timesteps):
        x = theirs.step(field(x, torch.full((len(x),), times[step], dtype=x.dtype)), timestep, x).prev_sample
    torch.testing.assert_close(unipc(field, NOISE, times, order=order), x, rtol=2e-5, atol=2e-5)


def test_a_path_goes_through_all_times():
    found = path(DATA.velocity, NOISE, timetable(400))
    torch.testing.assert_close(found[200], DATA.path(NOISE, 1.0, 0.5), atol=5e-3, rtol=0)
    assert torch.equal(found[0], NOISE)
    assert torch.equal(found[-1], euler(DATA.velocity, NOISE, timetable(400)))


def test_one_perfect_step_maps_noise_to_data_and_more_steps_keep_its_distribution():
    """A consistency student knows where the exact flow ends."""

    def student(x, time_N):
        ends = torch.stack([DATA.path(row, float(t), 0.0) for row, t in zip(x, time_N, strict=True)])
        return (x - ends) / time_N[:, None]

    torch.testing.assert_close(few_steps(student, NOISE, (1.0, 0.0), key=random.key(0)), DATA.path(NOISE, 1.0, 0.0))
    found = few_steps(student, Gaussian().sample(3000, 1), (1.0, 0.6, 0.3, 0.0), key=random.key(0))
    assert float(found.mean()) == pytest.approx(DATA.mean, abs=0.04)
    assert float(found.std()) == pytest.approx(DATA.std, rel=0.05)
    again = few_steps(student, NOISE, (1.0, 0.6, 0.0), key=random.key(1))
    assert not torch.equal(again, few_steps(student, NOISE, (1.0, 0.6, 0.0), key=random.key(2)))


def test_given_rows_stay_as_they_are():
    given_N = torch.arange(50) < 10
    found = euler(holding(DATA.velocity, given_N), NOISE, timetable(8))
    assert torch.equal(found[:10], NOISE[:10])
    few = few_steps(DATA.velocity, NOISE, (1.0, 0.5, 0.0), key=random.key(0), given_N=given_N)
    assert torch.equal(few[:10], NOISE[:10])
    assert not torch.equal(few[10:], NOISE[10:])
    assert not torch.equal(found[10:], NOISE[10:])


def test_the_velocity_tells_the_data():
    x, time_N = torch.ones(2, 1), torch.tensor([0.5, 0.25])
    torch.testing.assert_close(clean(x, time_N, x), torch.tensor([[0.5], [0.75]]))
    assert timetable(2, shift=3.0) == (1.0, 0.75, 0.0)
    assert shifted(shifted(0.3, 4.0), 0.25) == pytest.approx(0.3)


def test_times_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="must go down"):
        euler(DATA.velocity, NOISE, (0.0, 1.0))
    with pytest.raises(ValueError, match="must end at 0"):
        few_steps(DATA.velocity, NOISE, (1.0, 0.5), key=random.key(0))
    with pytest.raises(ValueError, match=r"it begins below 1, e.g. at 0.999"):
        unipc(DATA.velocity, NOISE, (1.0, 0.0))
    with pytest.raises(ValueError, match="at least one step"):
        timetable(0)
