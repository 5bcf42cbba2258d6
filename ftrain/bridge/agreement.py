"""What the files of a folder say twice must agree: entries with two names, and the tokenizer's ids with the table."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftrain.files.outside import JSON_BYTES
from ftrain.hf.files import CONFIG, parse_json, read_member

TOKENIZER = "tokenizer.json"
_NAMES: Mapping[str, str] = {"torch_dtype": "dtype"}
"""Entries of every configuration that had another name: the old one, and the one of today."""


def require_one_value(config: Mapping[str, Any], other_names: Mapping[str, str], shown: str) -> None:
    """ValueError for two entries of a configuration that are names of one thing and differ.

    `other_names`: other name -> name. `shown`: the file. Rotary positions may be in entries of their own too.

    >>> require_one_value({"n_embd": 8, "hidden_size": 16}, {"hidden_size": "n_embd"}, "config.json")
    Traceback (most recent call last):
    ValueError: config.json: n_embd=8 and hidden_size=16 are two names of one thing: leave the one that is meant
    """
    pairs = [
        ((name, config.get(name)), (other, config.get(other))) for other, name in {**_NAMES, **other_names}.items()
    ]
    for (name, value), (other, own) in [*pairs, *_rope(config)]:
        if value is not None and own is not None and value != own:
            raise ValueError(
                f"{shown}: {name}={value!r} and {other}={own!r} are two names of one thing: leave the one that is meant"
            )


def _rope(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The base of rotary positions, which has a place of its own since transformers 5."""
    newer = config.get("rope_parameters")
    if isinstance(newer, Mapping):
        yield ("rope_parameters.rope_theta", newer.get("rope_theta")), ("rope_theta", config.get("rope_theta"))


def require_rows_for_tokens(folder: Path, config: Mapping[str, Any]) -> None:
    """ValueError for a folder whose tokenizer has ids beyond the table of the model that `config` describes."""
    inner = config.get("text_config")
    rows = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    if not isinstance(rows, int) or not (folder / TOKENIZER).exists():
        return
    found = parse_json(read_member(folder, TOKENIZER, limit=JSON_BYTES), str(folder / TOKENIZER))
    largest = max(_ids(found), default=-1)
    if largest >= rows:
        raise ValueError(
            f"{folder / TOKENIZER} has the id {largest}, and {folder / CONFIG} a table of {rows} rows (vocab_size): "
            "take the tokenizer that belongs to the model, or give the table more rows with transformers "
            "(model.resize_token_embeddings)"
        )


def _ids(tokenizer: Mapping[str, Any]) -> Iterator[int]:
    """All ids of a tokenizer's file: of its model, by token or in their order, and of the tokens added."""
    model = tokenizer.get("model")
    tokens = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(tokens, Mapping):
        yield from (i for i in tokens.values() if isinstance(i, int))
    elif isinstance(tokens, list):
        yield len(tokens) - 1
    for added in tokenizer.get("added_tokens") or ():
        if isinstance(added, Mapping) and isinstance(added.get("id"), int):
            yield added["id"]
