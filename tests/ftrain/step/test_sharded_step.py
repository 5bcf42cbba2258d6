"""A step on a mesh equals the step on one device: FSDP and HSDP, with everything that a step is made of."""

import itertools
import math

import pytest
import torch

import ftrain
from ftrain import Mean, optim, tree
from ftrain.kernels.mean import sum_over_batch
from ftrain.modules import moe
from ftrain.modules.moe import MoEConfig
from ftrain.modules.spec import Constant, ParamSpec, ones
from ftrain.sharding import BatchRows, CapacityFactor, Dropless, Layout, Mesh, Plan
from tests.helpers.mesh_models import accumulated, compare, dense, mixture, plan_for

FSDP = [Mesh(1, 2, kind="virtual"), Mesh(2, 2, kind="virtual"), Mesh(1, 8, kind="virtual"), Mesh(4, 1, kind="virtual")]


MODELS = {"tied": dense(layers=1), "untied": dense(layers=1, tied=False), "mixture": mixture(layers=1)}
OF_THE_SUITE = [("tied", FSDP[1]), ("tied", FSDP[3]), ("untied", FSDP[1]), ("mixture", FSDP[2])]
"""Each mesh and each model; FSDP over two ranks is within the next one's HSDP."""


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if case in OF_THE_SUITE else pytest.mark.exhaustive)
        for case in itertools.product(MODELS, FSDP)
    ],
)
def test_loss_and_gradients_equal_those_of_one_device(name, mesh):
    model = MODELS[name]
    loss, gradients = compare(model, plan_for(model, mesh), dtype=torch.float64)
    assert loss < 1e-12
    assert gradients < 1e-12


@pytest.mark.parametrize("parameters", [(), ("shard",), ("shard", "sequence")])
def test_parameters_may_be_divided_or_copied(parameters):
    model = MODELS["tied"]
    loss, gradients = compare(model, plan_for(model, FSDP[1], Layout(parameters=parameters)))
    assert loss < 1e-6
    assert gradients < 1e-5


@pytest.mark.parametrize("remat", ["layer", pytest.param("all", marks=pytest.mark.exhaustive)])
def test_remat_on_a_mesh(remat):
    model = MODELS["mixture"]
    loss, gradients = compare(model, plan_for(model, FSDP[1]), remat=remat)
    assert loss < 1e-6
    assert gradients < 1e-5


def test_micro_batches_on_a_mesh():
    model = accumulated(mixture(balance="none", layers=1), 3)
    loss, gradients = compare(model, plan_for(model, FSDP[1]), dtype=torch.float64)
    assert loss < 1e-12
    assert gradients < 1e-12


def train_step(model, tx):
    def step(state, batch):
        (loss, terms), grads = ftrain.value_and_grad(model.loss, has_aux=True)(state.params, batch)
        return state.apply(tx, grads), {"loss": loss, **terms}

    return step


def test_a_run_on_a_mesh_equals_a_run_on_one_device():
    """20 steps with clipping and AdamW: losses, metrics and the last state."""
    model = dense(layers=1)
    tx = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(3e-3))
    one = ftrain.jit(train_step(model, tx), donate="state")
    many = ftrain.jit(train_step(model, tx), plan=plan_for(model, FSDP[1]), donate="state")
    init = lambda key: ftrain.TrainState.create(ftrain.init(model.specs, key), tx)  # noqa: E731
    states = [step.init(init, ftrain.key(3)) for step in (one, many)]
    assert all(map(torch.equal, tree.leaves(states[0]), tree.leaves(states[1])))
    batch = model.batch(4)
    for _ in range(20):
        states[0], a = one(states[0], batch)
        states[1], b = many(states[1], batch)
        torch.testing.assert_close(b, a, rtol=2e-5, atol=1e-5)
    for a, b in zip(tree.leaves(states[0]), tree.leaves(states[1]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "mesh", [pytest.param(FSDP[1], marks=pytest.mark.exhaustive), Mesh(1, 2, 2, 2, kind="virtual")], ids=str
)
def test_an_evaluation_step_sees_whole_parameters(mesh):
    model = MODELS["mixture"]
    params, batch = ftrain.init(model.specs, ftrain.key(0)), model.batch(4)
    evaluate = ftrain.forward(model.loss)
    alone = evaluate(params, batch)
    found = ftrain.jit(evaluate, plan=plan_for(model, mesh))(params, batch)
    for a, b in zip(tree.leaves(found), tree.leaves(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_each_rank_makes_only_its_own_pieces():
    """No tensor of the graph that makes a state is larger than the largest piece of a rank."""
    model = dense()
    plan = Plan(Mesh(1, 8, kind="fake"))
    make = ftrain.jit(lambda key: ftrain.init(model.specs, key), plan=plan)
    nodes = [n for n in make.lower(ftrain.key(0)).graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    largest = max(math.prod(p.local_shape) for p in plan.placements(model.specs).values())
    assert max(n.meta["val"].numel() for n in nodes) <= largest < max(s.elements for s in tree.leaves(model.specs)) / 4


def test_a_donated_state_cannot_be_used_again():
    model = dense()
    tx = optim.sgd(0.1)
    step = ftrain.jit(train_step(model, tx), plan=plan_for(model, FSDP[0]), donate="state")
    state = step.init(lambda key: ftrain.TrainState.create(ftrain.init(model.specs, key), tx), ftrain.key(0))
    step(state, model.batch(2))
    with pytest.raises(ValueError, match=r"'state\.params\..*was donated"):
        step(state, model.batch(2))


def test_a_loss_that_does_not_say_what_it_is_a_mean_of_is_refused():
    gradient = ftrain.grad(lambda params, batch: params["w"].sum() * batch.sum())
    specs = {"w": ParamSpec((4,), ("embed",), ones())}
    step = ftrain.jit(lambda params, batch: gradient(params, batch), plan=Plan(FSDP[0]), specs=specs)
    with pytest.raises(ValueError, match=r"return Mean\(total, count\)"):
        step({"w": torch.ones(4)}, torch.ones(4))


def test_a_result_that_differs_between_ranks_is_named():
    step = ftrain.jit(lambda batch: {"rows": 2 * batch}, plan=Plan(FSDP[0]), specs={})
    with pytest.raises(ValueError, match=r"result 'rows' must be the same on all ranks, and was computed from"):
        step(torch.tensor([1.0, 1.0, 3.0, 3.0]))


def test_means_in_a_result_are_of_the_whole_batch():
    step = ftrain.jit(lambda batch: {"mean": Mean.of(batch)}, plan=Plan(FSDP[1]), specs={})
    found = step(torch.arange(8.0))["mean"]
    assert (found.total, found.count) == (28.0, 8.0)


def test_a_batch_that_does_not_split_is_named():
    step = ftrain.jit(lambda batch: Mean.of(batch["x"]), plan=Plan(FSDP[1]), specs={})
    with pytest.raises(ValueError, match=r"'batch.x' of shape \[6\] does not split.* 4 packs"):
        step({"x": torch.ones(6)})


@pytest.mark.filterwarnings("ignore:<lambda> is traced again")
def test_a_batch_rule_that_no_leaf_obeys_is_named():
    step = ftrain.jit(lambda batch: Mean.of(batch["x"]), plan=Plan(FSDP[1], batch={"images": BatchRows()}), specs={})
    with pytest.raises(ValueError, match=r"Plan\(batch=...\): 'images' matches nothing; nearest: 'image'"):
        step({"x": torch.ones(8), "image": torch.ones(4)})
    assert step({"x": torch.ones(8), "images": torch.ones(4)}).count == 8
    assert step({"x": torch.ones(12)}).count == 12, "a modality may be absent from a later batch"


def test_a_fake_mesh_can_be_lowered_for_a_thousand_ranks():
    model = dense()
    step = ftrain.jit(model.step, plan=Plan(Mesh(4, 256, kind="fake")), specs=model.specs)
    params, batch = model.params(torch.float32), model.batch(1024)
    compiled = step.lower(params, batch)
    assert any("gather_ranks" in str(n.target) for n in compiled.graph.graph.nodes)
    with pytest.raises(ValueError, match="a fake mesh has shapes only"):
        step(params, batch)


RULES = {
    "adafactor": lambda: optim.adafactor(1e-2),
    "lion": lambda: optim.lion(1e-3),
    "muon": lambda: optim.multi_transform(
        {"muon": optim.muon(1e-2, ns_dtype=torch.float64), "rest": optim.adamw(1e-3)},
        [("**.w_*", "muon"), ("**", "rest")],
    ),
    "frozen": lambda: optim.skip_nonfinite(
        optim.multi_transform({"still": optim.freeze(), "rest": optim.sgd(1e-2)}, [("**.w_*", "still"), ("**", "rest")])
    ),
    "skip": lambda: optim.skip_nonfinite(optim.sgd(1e-2, momentum=0.9)),
}


EXPERTS, PADDED = Mesh(1, 2, 1, 2, "virtual"), Mesh(2, 3, kind="virtual")


@pytest.mark.parametrize(
    ("rule", "mesh"),
    [
        pytest.param(rule, mesh, marks=[] if (rule in ("lion", "skip")) == (mesh is PADDED) else pytest.mark.exhaustive)
        for rule in RULES
        for mesh in (EXPERTS, PADDED)
    ],
    ids=str,
)
def test_rules_that_look_at_whole_arrays(rule, mesh):
    """Two updates on pieces, padded ones and those of experts included, equal two on whole arrays."""
    model, tx = mixture(layers=1), RULES[rule]()
    params = model.params(torch.float64)
    grads = [tree.map(lambda p, i=i: torch.sin(p * 37 + i), params) for i in range(2)]

    def step(state, batch):
        for g in state["grads"]:
            state = {**state, "run": state["run"].apply(tx, g)}
        return state["run"]

    state = {"run": ftrain.TrainState.create(params, tx), "grads": grads}
    one = step(state, torch.zeros(6))
    many = ftrain.jit(step, plan=Plan(mesh), specs=model.specs)(state, torch.zeros(6))
    for path, a, b in zip(tree.paths(one), tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("how", [Dropless(), CapacityFactor(0.5)], ids=str)
def test_rows_that_a_capacity_drops_are_reported(how):
    """Of one device's choices in the first layer, which no capacity has touched yet."""
    cfg = MoEConfig(8, 6, experts=8, top_k=2)
    mesh = Mesh(1, 4, 1, 4, "virtual")
    params, x_TD = ftrain.init(moe.specs(cfg), ftrain.key(0)), ftrain.normal(ftrain.key(1), (32, 8))

    def dropped(params, batch):
        return sum_over_batch(moe.apply(params, batch["x_TD"], cfg=cfg)[1].dropped)

    chosen = moe.route(params["w_router_DE"], x_TD, cfg=cfg)[0]
    room = math.ceil(0.5 * 8 * 2 / 8)
    beyond = sum(max(0, n - room) for part in chosen.chunk(4) for n in part.flatten().bincount().tolist())
    plan = Plan(mesh, Layout(experts=how))
    counted = ftrain.jit(ftrain.forward(dropped), plan=plan, specs=moe.specs(cfg))(params, {"x_TD": x_TD})
    assert beyond > 0
    assert counted == (beyond if isinstance(how, CapacityFactor) else 0)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_state_leaf_with_a_dim_of_one_stays_so_where_a_piece_has_one_too(size):
    """A rank of three holds [2, 8, 1] of `w`, and [2, 8, 1] is all of its row."""
    specs = {"w": ParamSpec((2, 8, 3), (None, "mlp", "embed"), Constant(0.5))}
    plan = Plan(Mesh(shard=size, kind="virtual"), Layout())

    def init(key):
        params = ftrain.init(specs, key)
        made = (
            {"w": torch.zeros(2, 8, 1)},
            tree.map(torch.zeros_like, params),
            {"w": params["w"].mean(-1, keepdim=True)},
        )
        return {"params": params, "row": made[0], "moment": made[1], "mean": made[2]}

    def step(state, batch):
        row = tree.map(lambda r, p: r + p.square().mean(-1, keepdim=True), state["row"], state["params"])
        return {**state, "row": row}

    jitted = ftrain.jit(step, plan=plan, specs=specs)
    state = jitted.init(init, ftrain.key(0))
    for _ in range(2):
        assert {k: tuple(v["w"].shape) for k, v in state.items()} == {
            "params": (2, 8, 3), "row": (2, 8, 1), "moment": (2, 8, 3), "mean": (2, 8, 1),
        }  # fmt: skip
        state = jitted(state, {"x": torch.ones(size)})
    assert jitted.traces == 1
    torch.testing.assert_close(state["row"]["w"], torch.full((2, 8, 1), 0.5))
