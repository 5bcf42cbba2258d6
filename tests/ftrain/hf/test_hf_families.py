"""Any configuration of any family, whatever it leaves out: our decoder computes what transformers' class does."""

import copy
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftrain.hf import HfFolder, load_hf
from ftrain.modules import decoder
from ftrain.modules.hf_config import decoder_config
from ftrain.modules.hf_names import decoder_names

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FIXED = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"llama": 4, "mistral": 8, "mixtral": 8, "qwen2": 32, "qwen3": 32, "qwen3_moe": 4}
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}


def entries(**values: st.SearchStrategy) -> st.SearchStrategy[dict]:
    """Each entry is there or left out."""
    return st.fixed_dictionaries({}, optional=values)


THETA = st.sampled_from([1e3, 1e4, 1e6])
ROPE = st.one_of(
    entries(rope_theta=THETA),
    st.builds(lambda base, said: {"rope_theta": base, "rope_scaling": said}, THETA, st.sampled_from([None, LLAMA3])),
    st.builds(
        lambda base, said: {"rope_parameters": {"rope_theta": base, **said}}, THETA, st.sampled_from([LLAMA3, {}])
    ),
)
COMMON = entries(
    rms_norm_eps=st.sampled_from([1e-6, 1e-1]),
    tie_word_embeddings=st.booleans(),
    head_dim=st.sampled_from([4, 8]),
    max_position_embeddings=st.just(64),
    hidden_act=st.just("silu"),
)
OF_FAMILY = {
    "llama": entries(attention_bias=st.booleans(), num_key_value_heads=st.sampled_from([1, 2, None])),
    "mistral": entries(sliding_window=st.sampled_from([2, 3, None])),
    "mixtral": entries(sliding_window=st.sampled_from([2, 3, None])),
    "qwen2": entries(use_sliding_window=st.just(False), sliding_window=st.just(2)),
    "qwen3": entries(attention_bias=st.booleans()),
    "qwen3_moe": entries(
        norm_topk_prob=st.booleans(), mlp_only_layers=st.sampled_from([[], [0]]), attention_bias=st.booleans()
    ),
}


@st.composite
def configs(draw: st.DrawFn, name: str) -> dict:
    """Entries of a family, left out or null or in the words of transformers 4 or 5."""
    parts = [draw(COMMON), draw(ROPE), draw(OF_FAMILY[name]), EXPERTS.get(name, {})]
    if name == "qwen2":
        parts[0].pop("head_dim", None)
    said = {"model_type": name, **FIXED, "num_attention_heads": HEADS[name]}
    return {key: value for part in (said, *parts) for key, value in part.items()}


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_logits_are_those_of_transformers(name: str, data: st.DataObject) -> None:
    config = data.draw(configs(name))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**copy.deepcopy(config)), attn_implementation="eager"
    ).eval()
    tokens = torch.arange(12) * 5 % 32
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        cfg = decoder_config(config)
        assert decoder_config(HfFolder.open(folder).config()) == cfg  # as transformers writes it, all entries filled in
        params = load_hf(folder, decoder.specs(cfg), decoder_names(cfg))
        hidden, _ = decoder.apply(params, tokens, positions=torch.arange(12), segments=None, cfg=cfg)
        expected = model(tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(decoder.logits(params, hidden, cfg), expected, rtol=1e-3, atol=1e-4)
