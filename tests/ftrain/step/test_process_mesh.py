"""Real processes over gloo: what lockstep promised, twenty steps, lost ranks, and memory while a state is made."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import ftrain
from ftrain import AutoPlan, Aval, optim, tree
from ftrain.analysis.meter import measure_peak
from ftrain.checkpoint import Checkpointer, Ranks
from ftrain.modules import decoder, spec
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.plan.search import Options
from ftrain.plan.space import Space
from ftrain.sharding import Layout, Mesh, Plan, Ring
from tests.helpers.mesh_models import dense, mixture, on_one_device, plan_for
from tests.helpers.rank_processes import run

MESHES = {2: [Mesh(1, 1, 2), Mesh(1, 2, 1, 2)], 4: [Mesh(1, 2, 2, 2), Mesh(1, 1, 4, 4)]}
TRAINED = {2: Mesh(1, 2), 4: Mesh(2, 2)}


def equal_steps(rank, world, folder, found):
    """Loss and gradients of one step on each mesh, and the losses of twenty steps of training on another, the last
    ten of them a second time from a checkpoint.
    """
    for mesh in MESHES[world]:
        how = Layout(sequence=Ring()) if mesh.sequence == 4 else Layout()
        model = mixture(layers=1)
        params, batch, one = on_one_device(model, mesh.replicate * mesh.shard, torch.float32)
        step = ftrain.jit(model.step, plan=plan_for(model, mesh, how), specs=model.specs)
        loss, _, grads = step(step.shard(params, name="params"), step.share(batch))
        off = [
            float((a - b).norm() / a.norm().clamp(min=1e-30))
            for a, b in zip(tree.leaves(one[2]), tree.leaves(step.whole(grads)), strict=True)
        ]
        if rank == 0:
            found[str(mesh)] = (float(((loss - one[0]) / one[0]).abs()), max(off))
    model, tx = dense(layers=1), optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(3e-3))
    losses, again = _train(model, tx, TRAINED[world], folder)
    if rank == 0:
        found["curves"], found["again"] = [_train(model, tx, None, folder / "alone")[0], losses], again


def _train(model, tx, mesh, folder):
    """The losses of twenty steps, and those of the last ten after a restore of the tenth."""

    def step(state, batch):
        (loss, _), grads = ftrain.value_and_grad(model.loss, has_aux=True)(state.params, batch)
        return state.apply(tx, grads), loss

    plan = None if mesh is None else plan_for(model, mesh)
    jitted = ftrain.jit(step, plan=plan, donate="state")
    state = jitted.init(lambda key: ftrain.TrainState.create(ftrain.init(model.specs, key), tx), ftrain.key(3))
    abstract = ftrain.TrainState.create(spec.abstract(model.specs), tx)

    def train(state, steps):
        losses = []
        for _ in range(steps):
            state, loss = jitted(state, jitted.share(model.batch(4)))
            losses.append(float(loss))
        return state, losses

    ranks = None if mesh is None else Ranks.of_run()
    with Checkpointer(folder, ranks=ranks, specs=model.specs) as checkpoints:
        state, first = train(state, 10)
        checkpoints.save(state, 10)
        _, then = train(state, 10)
        _, again = train(checkpoints.restore(abstract, plan=plan), 10)
    return first + then, again


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_processes_compute_what_one_device_computes_and_resume_to_the_bit(world, tmp_path):
    found = run(equal_steps, world, world, tmp_path)
    for mesh in MESHES[world]:
        loss, gradients = found[str(mesh)]
        assert loss < 1e-6, mesh
        assert gradients < 1e-5, mesh
    assert found["curves"][1] == pytest.approx(found["curves"][0], rel=2e-5)
    assert found["curves"][0][-1] < found["curves"][0][0]
    assert found["again"] == found["curves"][1][10:]


def search_at_start_up(rank, found):
    """Each rank searches by figures of its own; all must end with one plan, and with the numbers of one device."""
    model = mixture(layers=1)
    params, batch = model.params(torch.float32), model.batch(2)
    options = Options(traced=1, processes=1, space=Space(rings=False), memory=1.0)
    step = ftrain.jit(model.step, plan=AutoPlan(memory="16GiB", options=options), specs=model.specs)
    plan = step.choose(tree.map(Aval.of, params), tree.map(Aval.of, batch))
    loss, _, grads = step(step.shard(params, name="params"), step.share(batch))
    one = model.step(params, batch)
    off = [
        float((a - b).norm() / a.norm().clamp(min=1e-30))
        for a, b in zip(tree.leaves(one[2]), tree.leaves(step.whole(grads)), strict=True)
    ]
    found[rank] = str(plan.mesh), plan.mesh.size, float(((loss - one[0]) / one[0]).abs()), max(off)


def test_a_layout_searched_at_start_up_is_the_same_on_all_processes():
    found = run(search_at_start_up, 2)
    assert found[0] == found[1]
    _, ranks, loss, gradients = found[0]
    assert ranks == 2
    assert loss < 1e-6
    assert gradients < 1e-5


def wide():
    heads = AttentionConfig(128, heads=4, kv_heads=4, head_dim=32)
    return decoder.specs(DecoderConfig(2048, 128, layers=6, attention=heads, d_hidden=512))


def make_state(rank, found):
    specs = wide()
    step = ftrain.jit(lambda params: params, plan=Plan(Mesh(1, 4)))
    make = lambda key: ftrain.init(specs, key)  # noqa: E731
    held = []
    peak = measure_peak(lambda: held.append(step.init(make, ftrain.key(0)))).peak
    whole = step.whole(held[0])
    if rank == 0:
        expected = ftrain.init(specs, ftrain.key(0))
        found["equal"] = all(map(torch.equal, tree.leaves(whole), tree.leaves(expected)))
        found["peak"], found["whole"] = peak, sum(x.nbytes for x in tree.leaves(expected))
        found["shapes"] = {tuple(x.to_local().shape) for x in tree.leaves(held[0]) if x.ndim == 1}


def test_no_rank_ever_holds_the_whole_model():
    found = run(make_state, 4)
    assert found["equal"]
    assert found["peak"] < 0.5 * found["whole"]
    assert found["shapes"] == {(32,)}


def lose_a_rank(rank, how, found):
    model, mesh = dense(layers=1), Mesh(1, dist.get_world_size())
    step = ftrain.jit(model.step, plan=plan_for(model, mesh), specs=model.specs)
    params, batch = step.shard(model.params(torch.float32), name="params"), step.share(model.batch(mesh.shard))
    step(params, batch)
    began = time.monotonic()
    try:
        for number in range(10_000):
            if rank == mesh.size - 1 and number == 3:
                time.sleep(1.5)
                os.kill(os.getpid(), how)
            step(params, batch)
    except RuntimeError as error:
        found[rank] = (str(error), time.monotonic() - began)
    os._exit(0)


@pytest.mark.parametrize(("world", "how"), [(2, signal.SIGKILL), (3, signal.SIGSTOP)])
def test_the_others_stop_and_name_the_lost_rank_and_the_collective(world, how):
    results = run(lose_a_rank, world, how, timeout=6, lost=[world - 1])
    assert sorted(results) == list(range(world - 1))
    for message, seconds in results.values():
        assert f"rank {world - 1} no longer answers" in message or f", {world - 1} no longer answers" in message
        assert "over shard" in message
        assert seconds < 60
