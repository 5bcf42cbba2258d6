"""How deltas begin and learn: nothing is changed at first, PiSSA moves numbers and no sum, rates of LoRA+, dropout."""

import pytest
import torch

import ftrain
from ftrain import lora, optim, tree
from ftrain.bridge.skeleton import flatten
from ftrain.sharding import Layout, Mesh, Plan
from tests.helpers.adapted_models import bridged, native


@pytest.mark.parametrize("case", [native("mixture", ["**"]), native("dense", dora=True), bridged("gpt2", dora=True)])
def test_a_new_delta_changes_nothing(case):
    base = ftrain.init(case.specs, ftrain.key(0))
    delta = case.adapter.init(ftrain.key(1), base=base)
    merged = lora.merge(base, delta, case.adapter)
    for path, x in flatten(base).items():
        torch.testing.assert_close(flatten(merged)[path], x, rtol=1e-6, atol=1e-7)
    batch = case.batch(1)
    torch.testing.assert_close(
        case.of_parts(delta, base, batch).value(), case.loss(base, batch).value(), rtol=1e-6, atol=1e-6
    )


def test_dora_measures_weights_before_it_begins():
    with pytest.raises(ValueError, match="give init\\(base="):
        native("dense", dora=True).adapter.init(ftrain.key(0))


@pytest.mark.parametrize("case", [native("dense"), bridged("llama"), bridged("gpt2", rslora=True)])
def test_pissa_moves_the_largest_directions_out_of_the_base(case):
    params = ftrain.init(case.specs, ftrain.key(0))
    base, delta = lora.pissa(params, case.adapter.init(ftrain.key(1)), case.adapter)
    for target in case.adapter.targets:
        old, new = flatten(params)[target.path], flatten(base)[target.path]
        values = torch.linalg.svdvals(old)
        torch.testing.assert_close(torch.linalg.svdvals(new)[0], values[target.rank], rtol=1e-4, atol=1e-6)
    merged = flatten(lora.merge(base, delta, case.adapter))
    for path, x in flatten(params).items():
        torch.testing.assert_close(merged[path], x, rtol=0, atol=1e-6)


def test_what_pissa_has_learned_can_be_had_beside_the_original_base():
    case = bridged("gpt2", rslora=True)
    params = ftrain.init(case.specs, ftrain.key(0))
    base, start = lora.pissa(params, case.adapter.init(ftrain.key(1)), case.adapter)
    learned = tree.map(lambda x: x + 0.1 * torch.randn(x.shape), start)
    adapter, delta = lora.beyond(start, learned, case.adapter)
    expected = flatten(lora.merge(base, learned, case.adapter))
    for path, x in flatten(lora.merge(params, delta, adapter)).items():
        torch.testing.assert_close(x, expected[path], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, lambda step: torch.full((), 0.1)], ids=["number", "schedule"])
def test_b_learns_faster(rate):
    case = native("dense")
    delta = case.adapter.init(ftrain.key(1))
    ones = tree.map(torch.ones_like, delta)
    tx = lora.plus(optim.sgd, rate, ratio=4.0)
    for path, update in flatten(tx.update(ones, tx.init(delta), delta)[0]).items():
        assert torch.allclose(update, torch.tensor(-0.4 if path.endswith(".B") else -0.1)), path


def test_dropout_draws_from_a_key_and_is_the_same_on_a_mesh_and_with_recompute():
    case = native("dense", dropout=0.3)
    delta, base, batch = case.arguments(packs=2)

    def loss(delta, base, batch, key):
        return case.loss(lora.bind(base, delta, case.adapter, key=key), batch)

    def step(**options):
        return ftrain.jit(lambda d, b, batch, key: ftrain.value_and_grad(loss)(d, b, batch, key), **options)

    one = step()(delta, base, batch, ftrain.key(1))
    plan = Plan(Mesh(shard=2, kind="virtual"), Layout())
    for other in (step(remat="layer"), step(plan=plan, specs=case.adapter.all_specs())):
        found = other(delta, base, batch, ftrain.key(1))
        for a, b in zip(tree.leaves(found), tree.leaves(one), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert float(one[0]) != float(step()(delta, base, batch, ftrain.key(2))[0])
    assert float(one[0]) != float(ftrain.value_and_grad(case.of_parts)(delta, base, batch)[0])
