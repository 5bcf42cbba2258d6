"""Losses of distillation on normal data, where paths, scores and perfect students are known."""

import math
from functools import partial

import pytest
import torch
from torch.func import vjp

import ftrain
from ftrain import Mean, lora, optim
from ftrain.kernels import random
from ftrain.modules.flow_sampling import few_steps
from ftrain.modules.spec import ParamSpec, fan_in
from ftrain.modules.velocity import along, clean, guided, timetable
from ftrain.sharding import Mesh, Plan
from ftrain.tasks.distill import (
    Baked,
    Consistency,
    ContinuousConsistency,
    Dmd,
    Fused,
    Progressive,
    Role,
    Trajectory,
)
from ftrain.tasks.distill.gan import Gan, head_logits, head_specs
from ftrain.tasks.distill.roles import averaged, updated
from ftrain.tasks.distill.rollout import causal_rollout, exit_step, from_data, rollout, with_history
from ftrain.tasks.distill.trajectory import states
from ftrain.tasks.flow import Flow, Times
from tests.helpers.gaussian_flow import Gaussian

KEY = random.key(5)
DATA, OTHER = Gaussian(0.7, 0.5), Gaussian(-0.4, 0.8)
N = 400
SAMPLES, NOISE, IDS = DATA.sample(N, 3), Gaussian().sample(N, 3, seed=1), torch.arange(N)
GIVEN = {"ids_N": IDS, "key": KEY}
TIMES = (1.0, 0.7, 0.4, 0.0)


def jump(x, time_N, to):
    """Where the exact flow of `DATA` goes from each row's own time."""
    t = time_N[:, None]
    end = torch.as_tensor(to, dtype=x.dtype).view(-1, 1) if torch.is_tensor(to) else to
    ratio = (DATA.variance(end) / DATA.variance(t)) ** 0.5
    return (1 - end) * DATA.mean + ratio * (x - (1 - t) * DATA.mean)


def perfect(x, time_N):
    """The student whose predicted data is where the path ends."""
    return (x - jump(x, time_N, 0.0)) / time_N.clamp(min=1e-9)[:, None]


def to_next(times):
    """The student whose step of Euler from each time leads to the next one."""

    def field(x, time_N):
        at = torch.tensor(times, dtype=x.dtype)
        to_N = at[(time_N[:, None].to(x.dtype) - at).abs().argmin(1) + 1]
        return (jump(x, time_N, to_N) - x) / (to_N - time_N)[:, None]

    return field


def near(field, by=0.1):
    return lambda x, time_N: field(x, time_N) + by


@pytest.mark.parametrize(("kind", "best"), [("data", perfect), ("secant", to_next(TIMES))])
def test_a_student_of_trajectories_is_perfect_where_its_teacher_goes(kind, best):
    found = states(DATA.velocity, NOISE, TIMES, each=200)
    assert found.shape == (4, N, 3)
    torch.testing.assert_close(found[-1], DATA.path(NOISE, 1.0, 0.0), atol=1e-2, rtol=0)
    loss = lambda field: Trajectory(kind).loss(field, found, TIMES, **GIVEN).item()  # noqa: E731
    assert loss(best) < 1e-4
    assert loss(near(best)) > 50 * loss(best)
    exact = torch.stack([DATA.path(NOISE, 1.0, time) for time in TIMES])
    off = Trajectory(kind).loss(near(best), exact, TIMES, **GIVEN).item()
    expected = 0.01 if kind == "secant" else 0.01 * sum(t**2 for t in TIMES[:3]) / 3
    assert off == pytest.approx(expected, rel=0.1)


def test_progressive_distillation_learns_two_steps_as_one():
    """Of Euler's own two steps, which are known, not of the exact flow."""
    times = (1.0, 0.5, 0.0)

    def best(x, time_N):
        half_N = time_N - 0.25
        middle = x - 0.25 * DATA.velocity(x, time_N)
        return (DATA.velocity(x, time_N) + DATA.velocity(middle, half_N)) / 2

    assert Progressive(times).loss(best, DATA.velocity, SAMPLES, **GIVEN).item() < 1e-12
    assert Progressive(times).loss(near(best), DATA.velocity, SAMPLES, **GIVEN).item() == pytest.approx(0.01, rel=1e-3)


def test_a_perfect_student_is_consistent_and_another_is_not():
    fine = timetable(400)
    loss = lambda field: Consistency(fine).loss(field, field, DATA.velocity, SAMPLES, **GIVEN).item()  # noqa: E731
    assert loss(perfect) < 1e-8
    assert loss(DATA.velocity) > 1e-7  # the field itself predicts means, which change along a path
    continuous = ContinuousConsistency(times=Times(low=0.02, high=0.98))
    of = lambda field: continuous.loss(field, DATA.velocity, SAMPLES, **GIVEN).item()  # noqa: E731
    assert of(perfect) < 1e-6
    assert of(DATA.velocity) > 1e-2
    flat = torch.full_like(SAMPLES, 0.3)  # whose slope is zero: what is left is noise less data
    alone = continuous.loss(lambda x, t: flat, None, SAMPLES, **GIVEN)
    noisy = Flow(continuous.times).noisy(SAMPLES, **GIVEN)
    torch.testing.assert_close(alone.value(), (flat - noisy.target).square().mean())


def test_the_slope_of_a_field_along_a_path_is_its_derivative():
    time_N = torch.linspace(0.1, 0.9, N, dtype=torch.float64)
    found = ContinuousConsistency(epsilon=1e-3).slope(perfect, NOISE, time_N, DATA.velocity(NOISE, time_N))
    _, exact = torch.func.jvp(perfect, (NOISE, time_N), (DATA.velocity(NOISE, time_N), torch.ones_like(time_N)))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    bounded = ContinuousConsistency(epsilon=1e-3, bound=0.1).slope(perfect, NOISE, time_N, DATA.velocity(NOISE, time_N))
    assert (bounded.square().mean(1).sqrt() < 1.1).all()


def test_the_direction_of_distribution_matching_is_the_difference_of_scores():
    dmd = Dmd(Times(low=0.499, high=0.501), scale="none")
    x = OTHER.sample(N, 3)
    g = dmd.direction(x, DATA.velocity, OTHER.velocity, **GIVEN)
    noisy = Flow(dmd.times).noisy(x, **GIVEN)
    scores = torch.stack(
        [OTHER.score(r, float(t)) - DATA.score(r, float(t)) for r, t in zip(noisy.x, noisy.time_N, strict=False)]
    )
    t = noisy.time_N[:, None].double()
    torch.testing.assert_close(g, t**2 / (1 - t) * scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dmd.direction(x, DATA.velocity, DATA.velocity, **GIVEN), torch.zeros_like(x))


def test_its_gradient_is_the_rollout_s_vector_jacobian_product_and_vanishes_at_the_data():
    """A student that makes `mean + std * noise` has the data's own mean and std as its only zero, on average."""
    dmd = Dmd(scale="none")
    many = {"ids_N": torch.arange(20_000), "key": KEY}
    noise = Gaussian().sample(20_000, 2)

    def made(student):
        return student["mean"] + student["std"] * noise

    def grads(mean, std):
        student = {"mean": torch.tensor(mean, dtype=torch.float64), "std": torch.tensor(std, dtype=torch.float64)}
        critic = Gaussian(mean, std).velocity  # a critic that has learnt the student's samples
        loss = lambda s: dmd.loss(made(s), DATA.velocity, critic, **many)  # noqa: E731
        value, found = ftrain.value_and_grad(loss)(student)
        g = dmd.direction(made(student), DATA.velocity, critic, **many)
        x, pull = vjp(made, student)
        torch.testing.assert_close(found, pull(g / x.numel())[0])
        torch.testing.assert_close(value, g.square().mean() / 2)
        return found

    assert all(abs(float(x)) < 1e-9 for x in grads(DATA.mean, DATA.std).values())
    assert grads(1.2, 0.5)["mean"] > 1e-2
    assert grads(0.1, 0.5)["mean"] < -1e-2
    assert grads(0.7, 0.9)["std"] > 1e-3
    assert grads(0.7, 0.2)["std"] < -1e-3


@pytest.mark.parametrize("scale", ["sample", "batch"])
def test_the_direction_is_scaled_by_the_distance_from_what_the_teacher_predicts(scale):
    ids_N = torch.tensor([0, 0, 1, 1])
    x, counted_N = OTHER.sample(4, 3), torch.tensor([True, True, True, False])
    given = {"ids_N": ids_N, "key": KEY}
    plain = Dmd(scale="none").direction(x, DATA.velocity, OTHER.velocity, **given)
    found = Dmd(scale=scale).direction(x, DATA.velocity, OTHER.velocity, **given, valid_N=counted_N)
    noisy = Flow(Dmd().times).noisy(x, **given)
    far = (x - clean(noisy.x, noisy.time_N, DATA.velocity(noisy.x, noisy.time_N))).abs().mean(1)
    size = torch.stack([far[:2].mean(), far[:2].mean(), far[2], far[2]]) if scale == "sample" else far[:3].mean()
    expected = plain / (size[:, None] if scale == "sample" else size)
    torch.testing.assert_close(found[:3], expected[:3])


def test_distribution_matching_teaches_a_student_the_data_in_one_step():
    """Student and critic are two numbers each; two updates of the critic go with one of the student."""
    noise = lambda i: Gaussian().sample(256, 1, seed=i)  # noqa: E731
    dmd, ids_N = Dmd(Times(low=0.1, high=0.9), scale="none"), torch.arange(256)
    roles = {"student": Role("student"), "critic": Role("critic")}
    fast, slow = optim.sgd(0.2), optim.sgd(0.5)
    start = {"mean": torch.tensor(0.2, dtype=torch.float64), "std": torch.tensor(0.9, dtype=torch.float64)}
    tree = roles["critic"].begun(roles["student"].begun({}, start, slow), start, fast)
    velocity = lambda p: Gaussian(p["mean"], p["std"]).velocity  # noqa: E731
    made = lambda p, i: p["mean"] + p["std"] * noise(i)  # noqa: E731

    def critic_loss(params, tree, batch):
        return dmd.critic_loss(velocity(params), made(tree["student"], batch[0]), ids_N=ids_N, key=batch[1]), ()

    def student_loss(params, tree, batch):
        x = made(params, batch[0])
        return dmd.loss(x, DATA.velocity, velocity(tree["critic"]), ids_N=ids_N, key=batch[1]), ()

    for i in range(50):
        batch, before = (i, random.fold_in(KEY, i)), tree
        tree, _, _ = updated(tree, roles["critic"], fast, critic_loss, batch)
        assert tree["student"] is before["student"]
        if i % 2 == 0:
            tree, _, _ = updated(tree, roles["student"], slow, student_loss, batch)
    assert float(tree["student"]["mean"]) == pytest.approx(DATA.mean, abs=0.06)
    assert float(tree["student"]["std"]) == pytest.approx(DATA.std, abs=0.08)


def test_baked_guidance_is_the_guided_field_and_fused_training_ends_there():
    told, untold = DATA.velocity, OTHER.velocity
    best = guided(told, untold, 3.0)
    assert Baked(3.0).loss(best, told, untold, SAMPLES, **GIVEN).item() == 0
    assert Baked(3.0).loss(near(best), told, untold, SAMPLES, **GIVEN).item() == pytest.approx(0.01)
    plain = Flow().loss(told, SAMPLES, **GIVEN)
    torch.testing.assert_close(Fused(3.0).loss(best, untold, SAMPLES, **GIVEN).value(), plain.value())
    shift = torch.zeros((), dtype=torch.float64)
    loss = lambda w: Fused(3.0).loss(near(best, w), near(untold, w), SAMPLES, **GIVEN)  # noqa: E731
    _, grad = ftrain.value_and_grad(loss)(shift)
    _, once = ftrain.value_and_grad(lambda w: Flow().loss(near(told, w), SAMPLES, **GIVEN))(shift)
    torch.testing.assert_close(grad, once / 3)  # through the conditional field alone


def test_the_best_head_knows_the_ratio_of_densities():
    """There its loss is `2 log 2 - 2 JSD` and its gradient zero."""
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    density = lambda d: torch.exp(-((x - d.mean) ** 2) / (2 * d.std**2)) / (d.std * math.sqrt(2 * math.pi))  # noqa: E731
    real, made, step = density(DATA), density(OTHER), x[1] - x[0]
    logit = (real.log() - made.log()).requires_grad_()
    gan = Gan()
    each = lambda p, loss: (p * step * loss).sum()  # noqa: E731
    at = [gan.head_loss(a, b).value() for a, b in ((logit[2000:2001], torch.full((1,), -torch.inf)),)]
    torch.testing.assert_close(at[0], torch.nn.functional.softplus(-logit[2000]))
    loss = each(real, torch.nn.functional.softplus(-logit)) + each(made, torch.nn.functional.softplus(logit))
    (grad,) = torch.autograd.grad(loss, logit)
    assert grad.abs().max() < 1e-9
    mixed = (real + made) / 2
    jsd = each(real, (real / mixed).log()) / 2 + each(made, (made / mixed).log()) / 2
    torch.testing.assert_close(loss.detach(), 2 * math.log(2) - 2 * jsd, atol=1e-5, rtol=0)


def test_a_head_judges_samples_by_the_mean_of_their_rows():
    params = ftrain.init(head_specs(4), KEY)
    features, ids_N = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 3, 3, 8, 8])
    logits, first_N = head_logits(params, features, ids_N)
    alone, _ = head_logits(params, features[3:], ids_N[3:])
    torch.testing.assert_close(logits[3:], alone)
    assert first_N.tolist() == [True, False, False, True, False]
    assert logits[0] == logits[2]
    judged = Gan(penalty=2.0).head_loss(logits, -logits, first_N, perturbed_N=logits + 0.1)
    expected = [2 * math.log1p(math.exp(-float(logits[i]))) + 0.02 for i in (0, 3)]
    assert judged.item() == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert Gan().student_loss(logits, first_N).count == 2
    with pytest.raises(ValueError, match="needs perturbed_N"):
        Gan(penalty=1.0).head_loss(logits, logits)


def test_a_rollout_is_the_sample_of_few_steps_with_the_gradient_of_one():
    x = rollout(perfect, NOISE, TIMES, key=KEY)
    torch.testing.assert_close(x, few_steps(perfect, NOISE, TIMES, key=KEY))
    torch.testing.assert_close(rollout(perfect, NOISE, TIMES, key=KEY, exit=0), DATA.path(NOISE, 1.0, 0.0))

    calls = []

    def student(w, x, time_N):
        calls.append(time_N[0])
        return w * perfect(x, time_N)

    w = torch.tensor(0.9, dtype=torch.float64)
    _, grad = ftrain.value_and_grad(lambda w: rollout(partial(student, w), NOISE, TIMES, key=KEY, exit=1).sum())(w)
    assert len(calls) == 2
    with torch.no_grad():
        first = few_steps(partial(student, w), NOISE, (1.0, 0.0), key=KEY)
        second = ftrain.modules.flow_sampling.renoised(first, 0.7, random.fold_in(KEY, 0))
    torch.testing.assert_close(grad, -(0.7 * perfect(second, torch.full((N,), 0.7))).sum())
    with pytest.raises(ValueError, match="exit=3 is none of the 3 steps"):
        rollout(perfect, NOISE, TIMES, key=KEY, exit=3)


def test_all_exits_are_as_likely_and_the_same_everywhere():
    drawn = [exit_step(7, number, 4) for number in range(200)]
    assert drawn == [exit_step(7, number, 4) for number in range(200)]
    assert all(30 < drawn.count(k) < 70 for k in range(4))


def chunk(w, cache, x, time_n, number):
    """A causal field whose chunks follow the mean of those before: a cache that is a tuple of rows."""
    history = sum(cache, torch.zeros_like(x)) / max(len(cache), 1)
    return w * (x - history), (*cache, x * (1 - along(time_n, x)) * w)


def test_a_causal_rollout_reads_what_it_made_and_its_gradient_is_that_of_each_exit():
    w, noises = torch.tensor(0.5, dtype=torch.float64), [NOISE[:4], NOISE[4:8], NOISE[8:12]]
    times = (1.0, 0.5, 0.0)

    def made(w):
        return causal_rollout(partial(chunk, w), (), noises, times, key=KEY)

    found = made(w)
    cache = ()
    for number, noise in enumerate(noises):
        here = lambda x, t: chunk(w, cache, x, t, number)[0]  # noqa: B023, E731
        torch.testing.assert_close(found[number], few_steps(here, noise, times, key=random.fold_in(KEY, number)))
        _, cache = chunk(w, cache, found[number], torch.zeros(4), number)
    _, grad = ftrain.value_and_grad(lambda w: made(w)[0].sum() + 0 * made(w)[1].sum())(w)
    x = few_steps(lambda x, t: chunk(w, (), x, t, 0)[0], noises[0], (1.0, 0.0), key=KEY)
    again = ftrain.modules.flow_sampling.renoised(x, 0.5, random.fold_in(random.fold_in(KEY, 0), 0))
    torch.testing.assert_close(grad, -(0.5 * again).sum())
    fields = with_history(partial(chunk, w), (), noises)
    expected, _ = chunk(w, (noises[0] * w,), noises[1], torch.ones(4), 1)
    torch.testing.assert_close(fields[1](noises[1], torch.ones(4)), expected)


def test_roles_are_views_of_one_base_and_an_update_writes_one_of_them():
    specs = {"w": ParamSpec((4, 4), ("embed", "mlp"), fan_in(4))}
    base, adapter = ftrain.init(specs, KEY), lora.add(specs, "w", rank=2)
    bind = partial(lora.bind, adapter=adapter)
    student, critic, tx = Role("student", "base", bind), Role("critic", "base", bind), optim.sgd(0.1)
    tree = {"base": base}
    for number, role in enumerate((student, critic)):
        tree = role.begun(tree, adapter.init(random.fold_in(KEY, number)), tx)
    x = torch.ones(2, 4)
    assert torch.equal(x @ student.of(tree)["w"], x @ base["w"])

    def loss(params, tree, batch):
        return Mean.of((batch @ params["w"] - batch @ Role("base").of(tree)["w"] - 1).square()), {
            "seen": torch.tensor(len(tree))
        }

    new, value, log = updated(tree, student, tx, loss, x)
    assert float(value) == pytest.approx(1)
    assert log["seen"] == len(tree)
    assert all(new[name] is tree[name] for name in ("base", "critic", "critic_opt"))
    assert not torch.equal(x @ student.of(new)["w"], x @ base["w"])
    jitted, again, _ = ftrain.jit(lambda tree, batch: updated(tree, student, tx, loss, batch))(tree, x)
    torch.testing.assert_close(jitted["student"], new["student"])
    torch.testing.assert_close(averaged(tree["student"], new["student"], 0.0), new["student"])
    assert float(again) == pytest.approx(1)
    with pytest.raises(ValueError, match="no 'critic_opt': start it"):
        updated({k: v for k, v in tree.items() if k != "critic_opt"}, critic, tx, loss, x)
    with pytest.raises(ValueError, match="needs bind"):
        Role("student", "base")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Trajectory("path"), "is not one of data, secant"),
        (lambda: Trajectory().loss(perfect, torch.zeros(2, N, 3), TIMES, **GIVEN), "2 states at 4 times"),
        (lambda: states(DATA.velocity, NOISE, (1.0, 0.5), each=1), "must end at 0"),
        (lambda: Consistency((1.0, 0.5)), "must end at 0"),
        (lambda: ContinuousConsistency(epsilon=0.0), "epsilon=0.0 must lie between"),
        (lambda: Progressive((0.0, 1.0)), "must go down"),
        (lambda: Dmd(scale="rows"), "is not one of sample, batch, none"),  # type: ignore[arg-type]
        (lambda: Baked(1.0), "scale=1.0 must be above 1"),
        (lambda: Fused(0.5), "scale=0.5 must be above 1"),
        (lambda: Gan(penalty=-1.0), "must not be negative"),
    ],
)
def test_what_cannot_be_is_refused(made, said):
    with pytest.raises(ValueError, match=said):
        made()


FIELD = {
    "w_in": ParamSpec((2, 8), ("embed", "mlp"), fan_in(2)),
    "w_out": ParamSpec((8, 2), ("mlp", "embed"), fan_in(8)),
}


def of(params):
    return lambda x, time_N: torch.tanh(x @ params["w_in"] + along(time_N, x)) @ params["w_out"]


def three_roles(tree, batch, key, tx=None):
    """A step of the critic and one of the student, whose teacher is a third tree."""
    dmd, given = Dmd(Times(low=0.1, high=0.9)), {"ids_N": batch["ids"], "key": key}
    made = lambda own: rollout(of(own), batch["noise"], TIMES, key=key, exit=1)  # noqa: E731
    critic = lambda own, seen, batch: (dmd.critic_loss(of(own), made(seen["student"]), **given), ())  # noqa: E731

    def student(own, seen, batch):
        teacher = guided(of(seen["teacher"]), lambda x, t: 0 * x, 2.0)
        return dmd.loss(made(own), teacher, of(seen["critic"]), **given), ()

    tree, first, _ = updated(tree, Role("critic"), tx, critic, batch)
    tree, second, _ = updated(tree, Role("student"), tx, student, batch)
    return tree, (first, second)


def test_three_roles_on_a_mesh_are_those_of_one_device():
    """Rows of four samples, which two ranks divide; the noise between steps and of the comparison is one device's."""
    tx, wide = optim.adamw(0.1), lambda tree: ftrain.tree.map(torch.Tensor.double, tree)
    tree = {"teacher": wide(ftrain.init(FIELD, random.key(1)))}
    for number, name in enumerate(("critic", "student")):
        tree = Role(name).begun(tree, wide(ftrain.init(FIELD, random.key(2 + number))), tx)
    batch = {"noise": Gaussian().sample(8, 2), "ids": torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])}
    expected, values = three_roles(tree, batch, KEY, tx)
    specs = dict.fromkeys(("teacher", "critic", "student"), FIELD)
    step = ftrain.jit(partial(three_roles, tx=tx), plan=Plan(Mesh(shard=2, kind="virtual")), specs=specs)
    found, again = step(tree, batch, KEY)
    torch.testing.assert_close(again, values)
    torch.testing.assert_close(found["student"], expected["student"])
    torch.testing.assert_close(found["critic"], expected["critic"])
    split = ftrain.jit(partial(three_roles, tx=tx), plan=Plan(Mesh(sequence=2, kind="virtual")), specs=specs)
    with pytest.raises(ValueError, match="share"):
        split(tree, batch, KEY)


FRAMES_GIVEN = torch.tensor([True, False, True, False])
ROWS, TWO = DATA.sample(4, 2), {"ids_N": torch.tensor([0, 0, 1, 1]), "key": KEY, "given_N": FRAMES_GIVEN}
STATES = torch.stack([torch.where(FRAMES_GIVEN[:, None], ROWS, ROWS + i) for i in range(4)])
CONDITIONED = {
    "data": lambda field: Trajectory("data").loss(field, STATES, TIMES, **TWO),
    "secant": lambda field: Trajectory("secant").loss(field, STATES, TIMES, **TWO),
    "progressive": lambda field: Progressive(TIMES).loss(field, field, ROWS, **TWO),
    "consistency": lambda field: Consistency(TIMES).loss(field, field, field, ROWS, **TWO),
    "continuous": lambda field: ContinuousConsistency().loss(field, field, ROWS, **TWO),
    "dmd": lambda field: Dmd().loss(rollout(field, ROWS, TIMES, key=KEY, given_N=FRAMES_GIVEN), field, field, **TWO),
    "critic": lambda field: Dmd().critic_loss(field, ROWS, **TWO),
    "from_data": lambda field: Mean.of(from_data(field, ROWS, TIMES, **TWO)[~FRAMES_GIVEN]),
    "baked": lambda field: Baked(2.0).loss(field, field, near(field), ROWS, **TWO),
    "fused": lambda field: Fused(2.0).loss(field, near(field), ROWS, **TWO),
}


@pytest.mark.parametrize("name", CONDITIONED)
def test_given_frames_reach_every_field_as_data_and_no_loss(name):
    calls = []

    def field(x, time_N):
        assert torch.equal(x[FRAMES_GIVEN], ROWS[FRAMES_GIVEN])
        assert not time_N[FRAMES_GIVEN].any()
        calls.append(time_N)
        found = DATA.velocity(x, time_N)
        return torch.where(FRAMES_GIVEN[:, None], found + 7, found)  # what it says of them is not heard

    def again(x, time_N):
        found = DATA.velocity(x, time_N)
        return torch.where(FRAMES_GIVEN[:, None], found - 3, found)

    torch.testing.assert_close(CONDITIONED[name](field).value(), CONDITIONED[name](again).value())
    assert calls
