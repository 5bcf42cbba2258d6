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
    assert (to / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()


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
