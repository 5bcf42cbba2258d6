"""Bridged language models write what transformers' own module writes, whatever its cache is."""

import copy

import pytest
import torch

from ftrain import tree
from ftrain.bridge import from_transformers
from ftrain.bridge.generation import Continued
from ftrain.bridge.skeleton import nest
from ftrain.modules.autoregression import generate

transformers = pytest.importorskip("transformers", minversion="5")

PROMPTS = [[5, 9, 7, 33, 12, 40, 8], [8, 20, 17], [44, 3, 9], [6]]
SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
GROUPED = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4}
KINDS = {
    "table of positions": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
    "experts, window": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
        use_sliding_window=True, sliding_window=4, max_window_layers=0,
    ),
    "recurrent": lambda: transformers.Mamba2Config(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1, state_size=8,
        initializer_range=0.3,
    ),
    "no cache": lambda: transformers.GraniteMoeConfig(
        **SMALL, intermediate_size=24, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        use_cache=False,
    ),
}  # fmt: skip


def plain(kind):
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(KINDS[kind]()).eval()
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = 0
    return module


def parameters(module):
    return nest({name: p.detach().clone() for name, p in module.named_parameters()})


def written(module, prompt, new):
    ids = torch.tensor([prompt])
    made = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_generate(kind):
    module = plain(kind)
    params = parameters(module)
    before = tree.map(torch.clone, params)
    model = from_transformers(copy.deepcopy(module.config))
    made = generate(params, PROMPTS, family=model.family, max_new=12)
    assert made == [written(module, prompt, 12) for prompt in PROMPTS]
    assert len({token for tokens in made for token in tokens}) > 4  # no model that says one word
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(params), tree.leaves(before), strict=True))


@pytest.mark.parametrize(("kind", "cached"), [("recurrent", True), ("table of positions", True), ("no cache", False)])
def test_a_cache_is_kept_where_the_module_gives_one(kind, cached):
    module = plain(kind)
    model = from_transformers(copy.deepcopy(module.config))
    _, groups = model.family.prefill(parameters(module), PROMPTS, 4)
    assert [group.tokens_BL.shape for group in groups] == [(1, 1), (2, 3), (1, 7)]
    assert all(bool(group.cache) == cached for group in groups)


@pytest.mark.parametrize(("prompts", "says"), [([], "no prompts"), ([[3], []], "prompt 1 is empty")])
def test_prompts_without_a_token_are_refused(prompts, says):
    module = plain("table of positions")
    model = from_transformers(copy.deepcopy(module.config))
    with pytest.raises(ValueError, match=says):
        generate(parameters(module), prompts, family=model.family, max_new=2)


def test_a_module_that_takes_its_cache_in_another_way_is_refused_by_its_name():
    config = transformers.CpmAntConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, dim_head=8, dim_ff=24,
    )  # fmt: skip
    make = lambda: transformers.AutoModelForCausalLM.from_config(config)  # noqa: E731
    with pytest.raises(ValueError, match="CpmAnt: it cannot continue a prompt here"):
        generate(parameters(make()), PROMPTS, family=Continued(make, "CpmAnt").family(), max_new=3)


def test_only_causal_language_models_write():
    config = transformers.BertConfig(**SMALL, intermediate_size=24)
    assert from_transformers(config, task="masked_lm").family is None
