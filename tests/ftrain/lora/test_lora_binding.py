"""`bind`: a loss of parts is the loss of the sum, in eager code, in a step, with recompute and on meshes, and no sum is
made.
"""

import pytest
import torch

import ftrain
from ftrain import lora, tree
from ftrain.lora.low_rank import LowRank
from ftrain.modules.spec import leaves_with_paths
from ftrain.sharding import Layout, Mesh, Plan
from tests.helpers.adapted_models import bridged, native

EVERYWHERE = ["**"]
CASES = {
    "dense": lambda: native("dense"),
    "dora": lambda: native("dense", dora=True),
    "mixture": lambda: native("mixture"),
    "table, head, router": lambda: native("mixture", EVERYWHERE),
    "llama": lambda: bridged("llama"),
    "tied": lambda: bridged("tied", EVERYWHERE),
    "experts": lambda: bridged("experts"),
    "gpt2": lambda: bridged("gpt2"),
}
MESHES = {"shard": Mesh(shard=2, kind="virtual"), "expert": Mesh(shard=2, expert=2, kind="virtual"),
          "sequence": Mesh(sequence=2, kind="virtual")}  # fmt: skip


def step_of(loss, **options):
    return ftrain.jit(lambda delta, base, batch: ftrain.value_and_grad(loss)(delta, base, batch), **options)


def assert_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
    for path, a, b in zip(tree.paths(found[1]), tree.leaves(found[1]), tree.leaves(expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, path=path: f"{path}: {m}")
        assert float(b.abs().max()) > 0, path


@pytest.mark.parametrize("kind", CASES)
def test_parts_give_the_loss_and_the_gradients_of_their_sum(kind):
    case = CASES[kind]()
    arguments = case.arguments()
    expected = ftrain.value_and_grad(case.of_sums)(*arguments)
    assert_equal(ftrain.value_and_grad(case.of_parts)(*arguments), expected)
    assert_equal(step_of(case.of_parts, remat="layer")(*arguments), expected)


KINDS = {
    "dense": "sequence",
    "dora": "shard",
    "table, head, router": "expert",
    "llama": "sequence",
    "experts": "expert",
}
"""What is trained on meshes, and the mesh that is part of the suite."""


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        pytest.param(kind, mesh, marks=[] if mesh == own else pytest.mark.exhaustive)
        for kind, own in KINDS.items()
        for mesh in MESHES
    ],
)
def test_a_mesh_gives_what_one_device_gives(kind, mesh):
    case = CASES[kind]()
    arguments = case.arguments(packs=2)
    plan = Plan(MESHES[mesh], Layout())
    sharded = step_of(case.of_parts, plan=plan, specs=case.adapter.all_specs())
    assert_equal(sharded(*arguments), ftrain.value_and_grad(case.of_sums)(*arguments))


@pytest.mark.parametrize("kind", ["dense", "mixture", "llama", "experts"])
def test_neither_the_sum_nor_the_gradient_of_a_weight_is_made(kind):
    case = CASES[kind]()
    arguments = case.arguments(packs=2)  # more tokens than any weight has rows
    of_parts, of_sums = (_made(step_of(loss), arguments) for loss in (case.of_parts, case.of_sums))
    weights = _weights(case, arguments[1])
    assert not of_parts & weights, "an op makes an array of the size of a changed weight"
    assert of_sums & weights, "the law would see it"


def _weights(case, base):
    leaves = dict(leaves_with_paths(base))
    found = {tuple(leaves[t.path].shape) for t in case.adapter.targets}
    return found | {(*shape[:-2], shape[-1], shape[-2]) for shape in found}


def _made(step, arguments):
    """Shapes of what the ops of a step make, views and what they look at left out."""
    graph = step.lower(*arguments).graph
    views = ("view", "t", "transpose", "permute", "slice", "detach", "expand", "unsqueeze")
    calls = [n for n in graph.graph.nodes if n.op == "call_function"]
    own = [n for n in calls if getattr(n.target, "_opname", "") not in views]
    values = [n.meta.get("val") for n in own]
    return {tuple(v.shape) for value in values for v in (value if isinstance(value, tuple | list) else [value])
            if isinstance(v, torch.Tensor)}  # fmt: skip


def test_a_bound_weight_answers_for_the_sum():
    case = native("dense")
    delta, base, _ = case.arguments()
    bound = lora.bind(base, delta, case.adapter)
    weight, whole = bound["layers"][0]["mlp"]["w_up_DF"], lora.merge(base, delta, case.adapter)
    assert isinstance(weight, LowRank)
    assert (weight.shape, weight.dtype) == ((32, 40), torch.float64)
    torch.testing.assert_close(weight + 0, whole["layers"][0]["mlp"]["w_up_DF"])
    assert bound["layers"][0]["attention"]["b_q_HK"].data_ptr() == base["layers"][0]["attention"]["b_q_HK"].data_ptr()


def test_the_base_gets_no_gradient_and_may_be_bfloat16():
    case = native("dense")
    delta, base, batch = case.arguments(dtype=torch.float32)
    half = tree.map(lambda x: x.bfloat16(), base)
    step = step_of(case.of_parts, precision="bfloat16")
    value, grads = step(delta, half, batch)
    expected, _ = ftrain.value_and_grad(case.of_parts)(delta, base, batch)
    assert abs(float(value) - float(expected)) < 0.02
    assert {g.dtype for g in tree.leaves(grads)} == {torch.float32}
