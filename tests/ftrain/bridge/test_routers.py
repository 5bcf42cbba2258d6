"""Routers of bridged models: where they send tokens, and biases that keep the load even, as those of native ones."""

import pytest
import torch

import ftrain
from ftrain import tree
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import flatten, nest
from ftrain.modules import moe
from ftrain.sharding import Layout, Mesh, Plan
from tests.helpers import text_families as laws
from tests.helpers.mesh_models import text_batch

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
BIASED = {
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **SIZES, first_k_dense_replace=1, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SIZES, **LATENT, first_k_dense_replace=1, n_routed_experts=4, n_group=1, topk_group=1, num_mtp_layers=0
    ),
    # a parameter that is not trained, of shape [1, E]
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **SIZES, moe_k=2, moe_num_experts=4, moe_layer_start_index=1
    ),
}


def plain(config):
    return transformers.Qwen3MoeConfig(**SIZES, num_experts=4) if config == "qwen3_moe" else BIASED[config]()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind a folder of random numbers, biases too."""
    made = tmp_path_factory.mktemp("routers")
    return {kind: laws.saved(laws.random_model(plain(kind)), made / kind) for kind in ("qwen3_moe", *BIASED)}


def biases(state):
    (found,) = flatten(state).values()
    return found.flatten()


def test_each_router_tells_where_tokens_go(folders):
    model = from_transformers(folders["qwen3_moe"])
    assert model.routed is not None
    assert model.state == {}
    given = laws.batch(61)
    mean, loads = model.routed(model.load(), given)
    assert mean.value().item() == pytest.approx(model.loss(model.load(), given).value().item())
    assert list(loads) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for found in moe.load_metrics(loads).values():
        assert found["shares_E"].sum().item() == pytest.approx(1.0)
        assert 0 < found["entropy"].item() < torch.tensor(4.0).log().item()
        assert found["busiest"].item() > 1
        assert found["dropped"].item() == 0
    assert all(load.load_E.sum() == 2 * load.count == 2 * len(given["tokens"]) for load in loads.values())


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_bridged_and_native_routers_tell_the_same(kind, folders):
    """And the biases move alike."""
    models = [ftrain.hf.open(folders[kind], native=how) for how in ("never", "always")]
    (one, loads), (other, of_native) = (m.routed(m.load(), laws.batch(61)) for m in models)
    assert one.value().item() == pytest.approx(other.value().item())
    for a, b in zip(loads.values(), of_native.values(), strict=True):
        assert torch.equal(a.load_E, b.load_E)
        assert a.count == b.count
    if models[0].state:
        one, other = (m.rebalanced(m.state, found) for m, found in zip(models, (loads, of_native), strict=True))
        assert torch.equal(biases(one), biases(other))
        assert not torch.equal(biases(one), biases(models[0].state))


@pytest.mark.parametrize("kind", BIASED)
def test_biases_move_against_the_load_and_are_saved(kind, folders, tmp_path):
    model = from_transformers(folders[kind])
    params, given = model.load(), laws.batch(61)
    before = biases(model.state)
    assert before.abs().min() > 0
    mean, after = model.loss(params, given)
    alone, loads = model.routed(params, given)
    assert mean.value().item() == alone.value().item()
    (load,) = (one.load_E for one in loads.values())
    torch.testing.assert_close(biases(after) - before, 1e-3 * (load.mean() - load).sign(), rtol=0, atol=1e-7)
    model.save(params, tmp_path, after)
    again = from_transformers(tmp_path)
    assert torch.equal(biases(again.state), biases(after))
    assert tree.diff(again.load(), params) == ""
    model.save(params, tmp_path)
    one, other = ((at / "model.safetensors").read_bytes() for at in (folders[kind], tmp_path))
    assert one == other


def test_the_plain_module_and_what_is_generated_have_the_biases_of_the_folder(folders):
    model = from_transformers(folders["glm4_moe"])
    params, given = model.load(), laws.batch(61)
    assert model.plain is not None
    assert model.family is not None
    loss, _ = model.plain(params, given)
    assert loss.item() == pytest.approx(model.loss(params, given)[0].value().item(), rel=1e-5)
    high = nest({name: torch.full_like(x, 0.0) for name, x in flatten(model.state).items()})
    apart = model.loss(params, given, state=high)[0].value().item()
    assert abs(apart - loss.item()) > 1e-3
    scores, _ = model.family.prefill(params, [given["tokens"][:9].tolist()], 1)
    torch.testing.assert_close(scores[0], model.logits(params, {"tokens": given["tokens"][:9]})[-1])


def test_micro_batches_on_a_mesh_move_them_as_one_device_does():
    """By the load of all tokens of the step, over experts that are divided and a sequence that is shared."""
    sizes = {**SIZES, "num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 4}
    model = from_transformers(transformers.Glm4MoeConfig(**sizes, n_shared_experts=1, n_group=1, topk_group=1))
    params = ftrain.init(model.specs, ftrain.key(0))
    given = {name.removesuffix("_T"): x for name, x in text_batch(61, 2, laws.LENGTHS).items()}

    def step(params, state, batch, parts):
        def loss(params, batch):
            return model.routed(params, batch, state=state)

        of = ftrain.accumulate(loss, parts, has_aux=True) if parts > 1 else loss
        (mean, loads), grads = ftrain.value_and_grad(of, has_aux=True)(params, batch)
        return mean, grads, model.rebalanced(state, loads), moe.load_metrics(loads)

    one = step(params, model.state, given, 1)
    plan = Plan(Mesh(sequence=2, expert=2, kind="virtual"), Layout())
    many = ftrain.jit(step, plan=plan, specs=model.specs)(params, model.state, given, 2)
    for path, a, b in zip(tree.paths(one), tree.leaves(one), tree.leaves(many), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=lambda m, path=path: f"{path}: {m}")
    assert biases(one[2]).abs().max() > 0
