"""Tiny chat models as folders, with a tokenizer of bytes and a chat template; and data files for them."""

import json
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|end|>", "<|start|>", "<|pad|>")


def write_chat_model(
    folder: Path, *, seed: int = 0, layers: int = 2, vocab: int = 260, template: str = TEMPLATE
) -> Path:
    """A Llama of 32 channels, whose weights come from the seed; the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    words.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    end, start, pad = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=end, pad_token=pad, additional_special_tokens=[start]
    )
    tokenizer.chat_template = template
    config: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": vocab, "max_position_embeddings": 512,
    }  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**config, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file of these rows."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chats(count: int) -> list[dict[str, Any]]:
    """Chats of one question and its answer, of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {i}" + "!" * (i % 7)},
                {"role": "assistant", "content": f"it is {i}" + "." * (i % 5)},
            ]
        }
        for i in range(count)
    ]


def preferences(count: int) -> list[dict[str, Any]]:
    """Prompts with a chosen and a rejected answer."""
    return [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": "no" + "o" * (i % 4)} for i in range(count)]


def judgements(count: int) -> list[dict[str, Any]]:
    """Prompts with an answer that is good or bad."""
    said = lambda i: f"it is {i}" if i % 2 == 0 else "no" * (1 + i % 3)  # noqa: E731
    return [{"prompt": f"say {i}", "completion": said(i), "label": i % 2 == 0} for i in range(count)]
