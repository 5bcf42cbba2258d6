"""PEFT as the oracle: its gradients, a step of AdamW, its folders in and out."""

import copy

import pytest
import torch

import ftrain
from ftrain import lora, optim, tree
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import flatten, nest
from tests.helpers.adapted_models import SIZES

transformers = pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")
# what PEFT itself calls and says of this transformers, and of layouts that it guesses
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

LLAMA = transformers.LlamaConfig(**SIZES)
MOE = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
GPT2 = transformers.GPT2Config(
    vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "lora": (LLAMA, {"target_modules": ATTENTION}),
    "rslora": (LLAMA, {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": (LLAMA, {"target_modules": ATTENTION, "use_dora": True}),
    "pissa": (LLAMA, {"target_modules": ATTENTION, "init_lora_weights": "pissa"}),
    "table and head": (LLAMA, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "experts": (MOE, {"target_modules": ["q_proj"],
                      "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "gpt2": (GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}  # fmt: skip
RATE = 1e-2


def rows():
    """Two documents as rows, the next token as the label of each."""
    tokens = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens, "labels": torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)}


def theirs(kind):
    """PEFT's model with deltas that are not zero."""
    config, options = KINDS[kind]
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **options)).train()
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data += 0.1 * torch.randn(p.shape)
    return adapted


def base_of(adapted, model):
    """The frozen parameters of PEFT's model, by our paths."""
    held = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p.detach().clone()
            for n, p in adapted.named_parameters() if "lora_" not in n}  # fmt: skip
    return nest({path: held[path] for path in flatten(model.specs)})


def loss_of(adapted, batch):
    logits = adapted(batch["tokens"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()), logits


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_those_of_peft(kind, tmp_path):
    adapted, model = theirs(kind), from_transformers(KINDS[kind][0])
    adapted.save_pretrained(tmp_path / "before", save_embedding_layers=False)
    adapter, delta = lora.load(tmp_path / "before", model)
    base, batch = base_of(adapted, model), rows()

    loss, logits = loss_of(adapted, batch)
    loss.backward()
    bound = lora.bind(base, delta, adapter)
    torch.testing.assert_close(model.logits(bound, batch), logits.detach(), rtol=0, atol=1e-5)

    step = ftrain.jit(
        lambda delta, base, batch: ftrain.value_and_grad(
            lambda delta, base, batch: model.loss(lora.bind(base, delta, adapter), batch)
        )(delta, base, batch)
    )
    value, grads = step(delta, base, batch)
    torch.testing.assert_close(value, loss.detach(), rtol=0, atol=1e-5)

    for p in adapted.parameters():
        p.data = p.data if p.grad is None else p.grad
    adapted.save_pretrained(tmp_path / "gradients", save_embedding_layers=False)
    _, expected = lora.load(tmp_path / "gradients", model)
    for path, found, of_peft in zip(tree.paths(grads), tree.leaves(grads), tree.leaves(expected), strict=True):
        torch.testing.assert_close(found, of_peft, rtol=1e-4, atol=1e-5, msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
def test_a_step_of_adamw_is_that_of_peft(kind, tmp_path):
    adapted, model = theirs(kind), from_transformers(KINDS[kind][0])
    adapted.save_pretrained(tmp_path / "before")
    adapter, delta = lora.load(tmp_path / "before", model)
    base, batch = base_of(adapted, model), rows()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    theirs_tx = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    loss_of(adapted, batch)[0].backward()
    theirs_tx.step()
    adapted.save_pretrained(tmp_path / "after")

    tx = optim.adamw(RATE, weight_decay=0.0)
    grads = ftrain.grad(lambda delta: model.loss(lora.bind(base, delta, adapter), batch))(delta)
    after = ftrain.TrainState.create(delta, tx).apply(tx, grads).params
    _, expected = lora.load(tmp_path / "after", model)
    for path, found, of_peft in zip(tree.paths(after), tree.leaves(after), tree.leaves(expected), strict=True):
        torch.testing.assert_close(found, of_peft, rtol=0, atol=1e-5, msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "table and head", "experts", "gpt2"])
def test_peft_loads_what_is_saved_and_gives_the_same_scores(kind, tmp_path):
    adapted, model = theirs(kind), from_transformers(KINDS[kind][0])
    adapted.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    adapter, delta = lora.load(tmp_path / "theirs", model)
    lora.save(delta, adapter, tmp_path / "ours")
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(KINDS[kind][0]), attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(module, tmp_path / "ours")
    with torch.no_grad():
        found, expected = (loss_of(x.eval(), rows())[1] for x in (again, adapted))
        alone = loss_of(plain(kind), rows())[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((found - alone).abs().max()) > 1e-3


def plain(kind):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(KINDS[kind][0]), attn_implementation="eager"
    ).eval()
