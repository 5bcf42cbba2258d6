"""All causal language models of transformers that run eager on a tiny configuration.

Legend: T tokens of a pack, B rows, L tokens of a row.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

import ftrain
from experiments.bench.covering.case import Built, Case, Shared, nothing_to_compare
from ftrain.bridge import from_transformers
from ftrain.bridge.draws import drawing
from ftrain.bridge.skeleton import flatten, nest

_SMALL = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "moe_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "d_model": 32,
    "n_layers": 2, "n_heads": 4, "ffn_dim": 48, "d_ff": 48, "word_embed_proj_dim": 32, "decoder_layers": 2,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout_prob": 0.0, "residual_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0, "dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": False, "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1, "moe_topk": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "sliding_window": 8, "n_positions": 128,
    "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2,
    "num_experts_per_token": 2, "num_expert_group": 1, "layer_group_size": 2, "num_kv_shared_layers": 0,
    "zero_expert_num": 2, "unpadded_vocab_size": 250,
}  # fmt: skip
"""What a configuration is made small with: the fields that it has of these."""
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
_PART = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
_NO_VOCABULARY = {name: size for name, size in _PART.items() if name != "vocab_size"}
_LOCAL = {**_PART, "hidden_size_global": 64, "cross_attn_k": 2}
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
_OWN: Mapping[str, Mapping[str, Any]] = {
    "bamba": _MAMBA,
    "blt": {
        "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4], "local_attention_window_len": 8,
        "patcher_config": _PART, "encoder_config": _LOCAL, "decoder_config": _LOCAL,
        "global_config": {**_NO_VOCABULARY, "hidden_size": 64},
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"layer_types": ["full_attention", "mlp"], "num_hidden_layers": 2},
    "dots3_note": {
        "text_config": {
            **_PART, **_LATENT, **{f"swa_{name}": size for name, size in _LATENT.items()},
            "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "sliding_window": 8,
            "layer_types": ["indexed_attention", "sliding_attention"], "moe_intermediate_size": 16,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "shared_experts_intermediate_size": 16,
            "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        "vision_config": {
            **_NO_VOCABULARY, "mlp_layer_types": ["dense", "dense"], "per_layer_config": None,
            "adapter_in_dim": 32, "adapter_out_dim": 32,
        },
        "audio_config": {**_NO_VOCABULARY, "adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _MAMBA,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 1, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "hc_lowrank": 8, "ngram_vocab_size_base": 64, "split_ngram_parts": 2,
    },
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "attention_head_size": 8,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4, "feed_forward_size": 48,
        "local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "n_mamba_heads": 2,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "attention_head_dim": 16, "attention_hidden_size": 64,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2, "n_mamba_heads": 8,
        "mamba_d_state": 8, "num_key_value_heads": 4, "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What a type of model needs beside."""
_DRAWS = ("phimoe",)
"""Types of models whose routers draw at random while they train: their rows have a key, for the plain module too."""
_PACK, _ACROSS, _ROWS, _DRAWN = (9, 7, 16), (21, 11), (16, 16), (8, 8, 8, 8)
"""Lengths of documents: of a pack whose halves are whole documents, of one whose middle is within one, of rows, of rows
with a key, of which a rank has several.
"""


def cases() -> tuple[Case, ...]:
    """A row for each type of model that transformers has a causal language model of."""
    return tuple(Case("causal_lm", name, partial(_build, name)) for name in names())


@cache
def names() -> tuple[str, ...]:
    """The types of models, in transformers' order."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def tiny(kind: str) -> Any:
    """A small configuration of a type of model, without dropout."""
    from transformers import CONFIG_MAPPING

    make: Callable[..., Any] = CONFIG_MAPPING[kind]
    return make(**{**_smaller(make().to_dict()), **_OWN.get(kind, {})})


def _smaller(usual: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that make a configuration small, and those within it (of towers)."""
    found: dict[str, Any] = {name: value for name, value in _SMALL.items() if name in usual}
    if "qk_rope_head_dim" in usual:  # the keys of latent attention: as many as queries, rotated as wide as that
        found |= {name: value for name, value in {"head_dim": 4, "num_key_value_heads": 4}.items() if name in usual}
    found |= {name: 0 for name, value in found.items() if isinstance(value, float) and type(usual[name]) is int}
    if usual.get("layer_types"):
        kinds = list(dict.fromkeys(usual["layer_types"]))  # a layer of each kind
        found["layer_types"] = kinds if len(kinds) > 1 else 2 * kinds
        found |= {name: len(found["layer_types"]) for name in ("num_hidden_layers", "n_layer") if name in usual}
    for name, value in usual.items():
        if isinstance(value, dict) and name.endswith("_config") and "model_type" in value:
            kind = value["model_type"]
            found[name] = {"model_type": kind, **_smaller(value), **_OWN.get(kind, {})}
    return found


def _build(kind: str) -> Built:
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = nothing_to_compare(lambda: tiny(kind))
    module = nothing_to_compare(lambda: plain_module(config))
    key = ftrain.key(7) if kind in _DRAWS else None
    on_rows = nothing_to_compare(partial(_drawn, module, key) if key is not None else partial(plain, module, _ROWS))
    model = from_transformers(copy.deepcopy(config))
    params = nest({name: module.get_parameter(name).detach().clone() for name in flatten(model.specs)})
    splits = {"sequence"} if model.packs else set()
    if any(spec.axes[:1] == ("expert",) for spec in flatten(model.specs).values()):
        splits.add("expert")
    return Built(
        model=model,
        params=params,
        batch=pack(_PACK) if model.packs else rows(_ROWS if key is None else _DRAWN),
        expected=partial(plain, module, _PACK) if model.packs else lambda: on_rows,
        splits=frozenset(splits),
        roundtrip=partial(_roundtrip, type(module), model, params),
        shared=Shared(pack(_ACROSS), partial(plain, module, _ACROSS)) if model.packs else None,
        key=key,
        about="packed" if model.packs else "rows" if key is None else "rows, drawn",
    )


def plain_module(config: Any) -> nn.Module:
    """transformers' own module in train mode, with its eager attention."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    return made.train()


def plain(module: nn.Module, lengths: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over documents of these lengths, each run alone, and its gradients by name.

    RuntimeError for a loss that is no number.
    """
    module.zero_grad()
    total, count = torch.zeros(()), 0
    for tokens_L, labels_L in documents(lengths):
        logits = module(input_ids=tokens_L[None]).logits[0].float()
        total = total + nn.functional.cross_entropy(logits, labels_L, ignore_index=-100, reduction="sum")
        count += len(tokens_L) - 1
    loss = total / count
    number = float(loss.detach())
    if not isfinite(number):
        raise RuntimeError(f"the loss is {number}")
    loss.backward()
    return number, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _drawn(module: nn.Module, key: Tensor) -> tuple[float, dict[str, Tensor]]:
    """As `plain` for rows, all at once, of a module that draws random numbers: those of `key`, int64 `[2]`."""
    module.zero_grad()
    batch = rows(_DRAWN)
    with drawing(key, *batch["tokens"].shape):
        logits = module(input_ids=batch["tokens"]).logits.float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads


def documents(lengths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of documents; the last token of each has no label."""
    tokens_T = torch.randint(3, 250, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return [(x, torch.cat([x[1:], x.new_tensor([-100])])) for x in tokens_T.split(list(lengths))]


def pack(lengths: Sequence[int]) -> Mapping[str, Tensor]:
    """The documents in one pack `[T]`, with ids and places."""
    tokens, labels = zip(*documents(lengths), strict=True)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    places = torch.cat([torch.arange(n) for n in lengths])
    return {"tokens": torch.cat(tokens), "labels": torch.cat(labels), "segments": segments, "positions": places}


def rows(lengths: Sequence[int]) -> Mapping[str, Tensor]:
    """The documents, of one length, as rows `[B, L]`."""
    tokens, labels = zip(*documents(lengths), strict=True)
    return {"tokens": torch.stack(tokens), "labels": torch.stack(labels)}


def _roundtrip(kind: Any, model: Any, params: Any) -> None:
    """Save, and load with transformers' class and with the bridge. AssertionError for another name or number."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(params, folder)
        loaded, told = kind.from_pretrained(folder, output_loading_info=True)
        strange = [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]
        if strange:
            raise AssertionError(f"transformers reads it with other names: {strange[:3]}")
        _same("transformers", dict(loaded.named_parameters()), flatten(params))
        _same("the bridge", flatten(from_transformers(folder).load()), flatten(params))


def _same(reader: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, x in wanted.items():
        if not torch.equal(found[name], x):
            raise AssertionError(f"{reader} reads other numbers for {name}")
