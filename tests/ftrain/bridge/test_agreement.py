"""Folders whose files contradict each other are refused, whichever model would be made of them."""

import json

import pytest

import ftrain
from tests.helpers.model_folders import write_model

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


def folder(tmp_path, **entries):
    """A llama whose configuration has these entries too."""
    write_model(transformers.LlamaConfig(**SIZES), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **entries}))
    return tmp_path


@pytest.mark.parametrize("native", ["auto", "always", "never"])
def test_a_tokenizer_with_more_ids_than_the_table_has_rows_is_refused(native, tmp_path):
    place = folder(tmp_path)
    ftrain.hf.open(place, native=native)
    tokenizer = json.loads((place / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 61, "content": "<new>", "special": True})
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer.json has the id 61, .* a table of 61 rows"):
        ftrain.hf.open(place, native=native)


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_theta": 5000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"torch_dtype": "float16", "dtype": "float32"},
    ],
)
def test_two_names_of_one_entry_that_differ_are_refused_by_both(entries, tmp_path):
    place = folder(tmp_path, **entries)
    with pytest.raises(ValueError, match=r"config.json: .*(dtype|rope_theta)=.* and .* are two names of one thing"):
        ftrain.hf.open(place, native="never")


def test_other_names_of_a_family_are_known(tmp_path):
    write_model(transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(ValueError, match="n_embd=16 and hidden_size=32 are two names of one thing"):
        ftrain.hf.open(tmp_path)


@pytest.mark.parametrize("native", ["auto", "always", "never"])
def test_quantized_weights_are_refused_by_their_name(native, tmp_path):
    place = folder(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="quant"):
        ftrain.hf.open(place, native=native).load()
