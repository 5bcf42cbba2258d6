"""Small models with tokenizers of words, as folders that transformers saves."""

from pathlib import Path
from typing import Any

import torch

TEXT = "the cat sat on the mat and saw the rat ; " * 40


def write_model(config: Any, folder: Path) -> None:
    """The causal language model of a configuration, and a tokenizer of the words of `TEXT`; others are "mat"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(sorted(set(TEXT.split())))}, unk_token="mat"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
