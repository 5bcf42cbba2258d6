"""Every transform, in both precisions, eager and traced: the loss falls, and the trace says what eager says."""

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ftrain import optim, tree
from tests.helpers.optimizers import TRANSFORMS, loss, problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_traced_and_eager_steps_agree_and_the_loss_falls(tx: optim.Transform, dtype: torch.dtype):
    params, batch = problem(dtype)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, torch.Tensor]:
        grads, value = torch.func.grad_and_value(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optim.apply_updates(params, updates), state, value

    values, treedef = tree.flatten((params, tx.init(params)))

    def flat_step(values: list[torch.Tensor], batch: Any) -> list[torch.Tensor]:
        return tree.leaves(step(*tree.unflatten(treedef, values), batch))

    traced = make_fx(flat_step, tracing_mode="fake")(values, batch)
    eager, losses = values, []
    for _ in range(30):
        *values, _ = traced(values, batch)
        *eager, value = flat_step(eager, batch)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    for path, a, b in zip(tree.paths(tree.unflatten(treedef, eager)), eager, values, strict=True):
        assert torch.equal(a, b), path


@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.*an update below 1/256")
def test_a_state_keeps_its_structure_shapes_and_dtypes(tx: optim.Transform):
    params = tree.map(torch.Tensor.bfloat16, problem(torch.float32)[0])
    state = tx.init(params)
    updates, after = tx.update(params, state, params)
    assert tree.diff(state, after) == ""
    assert tree.diff(params, optim.apply_updates(params, updates)) == ""
    counts = [x for p, x in zip(tree.paths(state), tree.leaves(state), strict=True) if p.endswith("steps")]
    assert all(c.dtype == torch.int64 and c.shape == () for c in counts)


@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradients_of_another_tree_or_shape_are_named(tx: optim.Transform):
    params = problem(torch.float32)[0]
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"'up\.b' is only in the parameters"):
        tx.update({**params, "up": {"w": params["up"]["w"]}}, state, params)
    with pytest.raises(ValueError, match=r"'scale' have shape \[1\], the parameter has \[\]"):
        tx.update({**params, "scale": params["scale"][None]}, state, params)


def test_lion_is_its_definition():
    torch.manual_seed(0)
    p, m = torch.randn(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    tx = optim.lion(0.01, b1=0.9, b2=0.95, weight_decay=0.2)
    ours, state = p, tx.init(p)
    for _ in range(10):
        g = torch.randn(5, dtype=torch.float64)
        updates, state = tx.update(g, state, ours)
        ours = optim.apply_updates(ours, updates)
        p = p - 0.01 * (torch.sign(0.9 * m + 0.1 * g) + 0.2 * p)
        m = 0.95 * m + 0.05 * g
    torch.testing.assert_close(ours, p, rtol=1e-12, atol=1e-12)


def test_a_scheduled_rate_sees_how_many_updates_were_made():
    schedule = optim.linear(0.0, 1.0, steps=4)
    for tx in (optim.sgd(schedule), optim.chain(optim.scale_by_schedule(schedule), optim.scale(-1.0))):
        p = torch.zeros(1)
        state, moves = tx.init(p), []
        for _ in range(6):
            updates, state = tx.update(torch.ones(1), state, p)
            moves.append(-float(updates))
        assert moves == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_scheduled_adamw_is_one_whose_rate_is_set_by_hand():
    schedule = optim.warmup_cosine(0.1, warmup_steps=2, total_steps=6)
    params = {"w": torch.ones(3, dtype=torch.float64)}
    tx = optim.adamw(schedule, weight_decay=0.1)
    ours, state = params, tx.init(params)
    leaf = params["w"].clone().requires_grad_()
    theirs = torch.optim.AdamW([leaf], lr=0.1, weight_decay=0.1)
    for t in range(8):
        g = torch.arange(3, dtype=torch.float64) - t
        updates, state = tx.update({"w": g}, state, ours)
        ours = optim.apply_updates(ours, updates)
        leaf.grad, theirs.param_groups[0]["lr"] = g, float(schedule(torch.tensor(t)))
        theirs.step()
    torch.testing.assert_close(ours["w"], leaf.detach(), rtol=1e-7, atol=0)


@pytest.mark.filterwarnings("ignore:.*an update below 1/256")
def test_the_average_of_gradients_may_be_kept_in_bfloat16_and_squares_never():
    state = optim.adamw(1e-3, state_dtype=torch.bfloat16).init({"w": torch.zeros(2, dtype=torch.bfloat16)})
    assert (state.mean["w"].dtype, state.square["w"].dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.adamw(-1.0), "learning_rate must be >= 0.0, not -1.0"),
        (lambda: optim.adamw(1.0, b2=1.0), "b2 must be >= 0.0 and < 1.0, not 1.0"),
        (lambda: optim.sgd(1.0, nesterov=True), "nesterov=True needs a momentum"),
        (lambda: optim.lion(1.0, weight_decay=-1.0), "weight_decay must be >= 0.0"),
        (lambda: optim.adafactor(clip=0.5), "clip must be >= 1.0"),
        (lambda: optim.muon(1.0, adjust="mine"), "adjust must be 'original' or 'match_rms_adamw', not 'mine'"),
        (lambda: optim.muon(1.0).init({"norm": {"g": torch.ones(8)}}), r"'norm.g' has shape \[8\]; .*multi_transform"),
        (lambda: optim.clip_by_global_norm(-1.0), "max_norm must be >= 0.0"),
        (lambda: optim.clip_by_global_norm(0.0), "max_norm=0 makes every gradient zero"),
        (lambda: optim.ema(1.0), "decay must be >= 0.0 and < 1.0"),
        (lambda: optim.skip_nonfinite(optim.freeze(), max_consecutive=0), "max_consecutive must be >= 1"),
        (lambda: optim.adamw(float("nan")), "learning_rate must be >= 0.0, not nan"),
        (lambda: optim.adamw("1e-3"), "learning_rate must be a number, not '1e-3'"),
        (lambda: optim.adamw(torch.ones(2)), r"must be floating and 0-d, not torch\.float32 \[2\]"),
        (lambda: optim.adamw(1e-3, weight_decay=torch.ones(())), "weight_decay must be a number of Python"),
        (lambda: optim.warmup_cosine_decay_schedule(0.0, 1.0, 10, 10), "decay_steps=10 holds the warm-up"),
    ],
)
def test_bad_arguments_are_named(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
