"""Masked language models that make a mask of their own, and look into it while they run.

Legend: B rows, L tokens of a row, V vocabulary.
"""

import copy

import pytest
import torch

import ftrain
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import nest, parameters

transformers = pytest.importorskip("transformers", minversion="5")

_PADDING = 2
_XLM = {"vocab_size": 61, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "dropout": 0.0, "attention_dropout": 0.0}
CONFIGS = {
    "XLM": lambda: transformers.XLMConfig(**_XLM, pad_token_id=_PADDING),
    "FlauBERT": lambda: transformers.FlaubertConfig(**_XLM, pad_token_id=_PADDING),
    "Longformer": lambda: transformers.LongformerConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_window=4,
        max_position_embeddings=32,
        pad_token_id=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_their_scores_are_those_of_the_plain_module(kind):
    config = CONFIGS[kind]()
    torch.manual_seed(0)
    module = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
    tokens_BL = torch.randint(3, 61, (2, 8), generator=torch.Generator().manual_seed(1))
    if kind != "Longformer":  # XLM and FlauBERT see no tokens behind the ones that they count
        tokens_BL[1, 5:] = _PADDING
    model = from_transformers(copy.deepcopy(config), task="masked_lm")
    params = nest({name: p.detach().clone() for name, p in parameters(module).items()})
    found_BLV = ftrain.jit(lambda params, batch: model.logits(params, batch))(params, {"tokens": tokens_BL})
    with torch.no_grad():
        torch.testing.assert_close(found_BLV, module(input_ids=tokens_BL).logits)
