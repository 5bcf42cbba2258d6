"""`ftrain.hf.open`: the library's own family where there is one, else transformers'; both give the same numbers."""

import pytest
import torch

import ftrain

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def pack():
    tokens = torch.randint(0, 61, (24,), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens, "labels": tokens.roll(-1), "segments": torch.arange(24) // 9}


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


def test_native_and_bridged_give_the_same(llama):
    native, bridged = ftrain.hf.open(llama), ftrain.hf.open(llama, native="never")
    assert native.why.startswith("native: llama")
    assert bridged.why == 'bridged: native="never"'
    of_native, of_bridge = (model.loss(model.load(), pack()).value() for model in (native, bridged))
    torch.testing.assert_close(of_native, of_bridge, rtol=0, atol=1e-5)
    hidden = [model.hidden(model.load(), {"tokens": pack()["tokens"].view(2, 12)}) for model in (native, bridged)]
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-4)


def test_another_family_is_bridged_and_says_why(tmp_path):
    config = transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = ftrain.hf.open(tmp_path)
    assert model.why.startswith("bridged: ")
    assert "gpt2" in model.why
    with pytest.raises(ValueError, match="gpt2"):
        ftrain.hf.open(tmp_path, native="always")


def test_a_saved_native_model_is_the_folder(llama, tmp_path_factory):
    to = tmp_path_factory.mktemp("out")
    model = ftrain.hf.open(llama)
    model.save(model.load(), to)
    for name in ("model.safetensors", "generation_config.json"):
        assert (to / name).read_bytes() == (llama / name).read_bytes()


def test_a_native_model_generates(llama):
    from ftrain.modules.autoregression import generate

    model = ftrain.hf.open(llama)
    ids = generate(model.load(), [[1, 2, 3]], family=model.family, max_new=4)
    loaded = transformers.LlamaForCausalLM.from_pretrained(llama)
    expected = loaded.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert ids == [expected[0, 3:].tolist()]


def test_another_word_is_refused(llama):
    with pytest.raises(ValueError, match="'maybe'"):
        ftrain.hf.open(llama, native="maybe")


def test_what_a_folder_holds_beside_parameters_is_taken(tmp_path):
    """The balancing biases of DeepSeek's routers, which are buffers: a bridged model has those of its folder."""
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1}
    sizes |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    sizes |= {"first_k_dense_replace": 1, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**{**SIZES, **sizes}))
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([3.0, 0.0, 0.0, 2.0]))
    model.save_pretrained(tmp_path / "in")
    tokens = pack()["tokens"]
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    for native in ("always", "never"):
        found = ftrain.hf.open(tmp_path / "in", native=native)
        torch.testing.assert_close(found.logits(found.load(), {"tokens": tokens}), expected, rtol=0, atol=1e-5)
        found.save(found.load(), tmp_path / native)
        again = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / native)
        assert again.model.layers[1].mlp.gate.e_score_correction_bias.tolist() == [3.0, 0.0, 0.0, 2.0]
