"""Masked language models of transformers: those of the most downloads.

Legend: T tokens of a pack, B rows, L tokens of a row.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench.covering.case import Built, Case, Shared, nothing_to_compare
from experiments.bench.covering.rowwise import DROPOUTS, roundtrip
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import nest, parameters

_SMALL = {
    "vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "embedding_size": 16, "pad_token_id": 0, "n_layers": 2, "n_heads": 2, "dim": 16,
    "hidden_dim": 24, "emb_dim": 16, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "block_sizes": [1, 1],
    "block_repeats": [1, 1], "num_decoder_layers": 1, "intra_bottleneck_size": 8, "true_hidden_size": 8,
    "attention_window": 8, "block_size": 4, "num_random_blocks": 1, "local_attention": 8, "head_dim": 8,
    "pooler_hidden_size": 16, "embedding_dropout": 0.0, "mlp_dropout": 0.0, "summary_last_dropout": 0.0,
    "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3,
    "layer_types": ["full_attention", "sliding_attention"], "num_key_value_heads": 2, "num_groups": 1,
}  # fmt: skip
"""What a configuration is made small with: the fields that it has of these."""
_KINDS = {
    "bert": {}, "roberta": {}, "xlm-roberta": {}, "distilbert": {}, "albert": {}, "electra": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
                   "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    "mpnet": {}, "camembert": {}, "xlm": {}, "flaubert": {}, "roformer": {}, "convbert": {}, "mobilebert": {},
    "squeezebert": {"q_groups": 1, "k_groups": 1, "v_groups": 1, "intermediate_groups": 1, "output_groups": 1},
    "funnel": {}, "modernbert": {}, "layoutlm": {}, "longformer": {}, "big_bird": {}, "nomic_bert": {}, "ernie": {},
    "esm": {"mask_token_id": 32}, "fnet": {}, "megatron-bert": {}, "rembert": {"input_embedding_size": 16,
                                                                             "output_embedding_size": 16},
}  # fmt: skip
_PACK, _ACROSS, _ROWS = (9, 7, 16), (21, 11), (16, 16)
"""Lengths of documents: of a pack whose halves are whole documents, of one whose middle is within one, of rows."""


def cases() -> tuple[Case, ...]:
    """A row for each family."""
    return tuple(Case("masked_lm", kind, partial(_build, kind, options)) for kind, options in _KINDS.items())


def _config(kind: str, options: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    make: Any = CONFIG_MAPPING[kind]
    usual = make().to_dict()
    small = {name: value for name, value in {**DROPOUTS, **_SMALL}.items() if name in usual}
    return make(**{**small, **options})


def _build(kind: str, options: Mapping[str, Any]) -> Built:
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    config = nothing_to_compare(lambda: _config(kind, options))
    module = nothing_to_compare(lambda: _plain_module(config))
    on_rows = nothing_to_compare(partial(_plain, module, _ROWS))
    model = from_transformers(copy.deepcopy(config), task="masked_lm")
    params = nest({name: p.detach().clone() for name, p in parameters(module).items()})
    return Built(
        model=model,
        params=params,
        batch=_pack(_PACK) if model.packs else _rows(_ROWS),
        expected=partial(_plain, module, _PACK) if model.packs else lambda: on_rows,
        splits=frozenset({"sequence"} if model.packs else ()),
        roundtrip=partial(roundtrip, "AutoModelForMaskedLM", "masked_lm", model, params),
        shared=Shared(_pack(_ACROSS), partial(_plain, module, _ACROSS)) if model.packs else None,
        about="packed" if model.packs else "rows",
    )


def _plain_module(config: Any) -> nn.Module:
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(0)
    made: nn.Module = AutoModelForMaskedLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    return made.train()


def _plain(module: nn.Module, lengths: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over documents of these lengths, each run alone, and its gradients by name.

    RuntimeError for a loss that is no number.
    """
    module.zero_grad()
    total, count = torch.zeros(()), 0
    for tokens_L, labels_L in _documents(lengths):
        logits = module(input_ids=tokens_L[None]).logits[0].float()
        total = total + nn.functional.cross_entropy(logits, labels_L, ignore_index=-100, reduction="sum")
        count += int((labels_L != -100).sum())
    loss = total / count
    if not torch.isfinite(loss):
        raise RuntimeError(f"the loss is {float(loss)}")
    loss.backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads


def _documents(lengths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Tokens of documents, every third of which is hidden by another and is the label."""
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(5, 120, (sum(lengths),), generator=generator)
    hidden_T = torch.arange(sum(lengths)) % 3 == 0
    shown_T, labels_T = torch.where(hidden_T, 4, tokens_T), torch.where(hidden_T, tokens_T, -100)
    return list(zip(shown_T.split(list(lengths)), labels_T.split(list(lengths)), strict=True))


def _pack(lengths: Sequence[int]) -> dict[str, Tensor]:
    """The documents in one pack `[T]`, with ids and places."""
    tokens, labels = zip(*_documents(lengths), strict=True)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    places = torch.cat([torch.arange(n) for n in lengths])
    return {"tokens": torch.cat(tokens), "labels": torch.cat(labels), "segments": segments, "positions": places}


def _rows(lengths: Sequence[int]) -> dict[str, Tensor]:
    """The documents, of one length, as rows `[B, L]`."""
    tokens, labels = zip(*_documents(lengths), strict=True)
    return {"tokens": torch.stack(tokens), "labels": torch.stack(labels)}
