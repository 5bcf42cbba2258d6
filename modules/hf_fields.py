"""Entries of a `config.json`: sizes and numbers that are such, and none that says something nobody follows.

An entry that says nothing (null, false, zero, empty) may be there. One of another name is refused: a word that is
misread or left out gives a model that trains and answers, only worse.
"""

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

Config = Mapping[str, Any]

# About the file, the tokenizer, generation, the loss's extras or how transformers runs a model: never the forward pass.
HARMLESS = frozenset({
    "architectures", "auto_map", "bad_words_ids", "base_model_pp_plan", "base_model_tp_plan",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "image_token_id", "initializer_range", "is_decoder", "is_encoder_decoder", "keys_to_ignore_at_inference",
    "label2id", "length_penalty", "max_length", "max_new_tokens", "max_position_embeddings", "max_window_layers",
    "min_length", "model_max_length", "model_type", "name_or_path", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "router_aux_loss_coef",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p",
    "unk_token_id", "use_bfloat16", "use_cache", "vocab_size",
})  # fmt: skip


def require_understood(config: Config, read: Collection[str]) -> None:
    """ValueError that names an entry which says something, is not in `read`, and may change the numbers."""
    for field, value in config.items():
        private = field.startswith(("_", "unsloth_")) or field in HARMLESS
        if private or field in read or value is None or value in (False, 0, "", [], {}):
            continue
        near = difflib.get_close_matches(field, [*read], n=1, cutoff=0.75)
        hint = f"did you mean {near[0]!r}?" if near else "if it changes nothing, take it out of the file"
        raise ValueError(f"config.json: {field}={value!r} is not understood, and may change the numbers: {hint}")


def size(config: Config, field: str, default: int | None = None) -> int:
    """A whole number of at least 1; where the entry is missing or null the default.

    Raises:
        ValueError: it is none, or is missing and has no default; the entry is named.

    >>> from ftrain.modules.hf_fields import size
    >>> size({"hidden_size": 64}, "hidden_size"), size({}, "num_experts", 8)
    (64, 8)
    """
    value = config.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {field}={value!r} must be a whole number of at least 1")
    return value


def number(config: Config, field: str, default: float, *, where: str = "") -> float:
    """A finite number above 0; the default where the entry is missing or null.

    `where`: the entry that holds `config`, as "rope_scaling.", for messages. ValueError for what is no such number.
    """
    value = config.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {where}{field}={value!r} must be a number above 0")
    return float(value)


def flag(config: Config, field: str) -> bool:
    """True or false; false where the entry is missing or null. ValueError for anything else."""
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {field}={value!r} must be true or false")
    return bool(value)


def agreed(config: Config, *spellings: str) -> Any:
    """The value of the one entry that has several names; None where none is there. ValueError if two differ."""
    found = {name: config[name] for name in spellings if config.get(name) is not None}
    values = list(found.values())
    for name, value in found.items():
        if value != values[0]:
            first = next(iter(found))
            raise ValueError(
                f"config.json: {first}={values[0]!r} and {name}={value!r} are two names of one thing: leave the one "
                "that is meant"
            )
    return values[0] if values else None
