"""Attention that drops weights: where nothing is dropped it is torch's, and what is dropped follows the law.

Legend: B rows, L tokens of a row, H heads.
"""

import pytest
import torch
from torch import nn

import ftrain
from ftrain.bridge.dropped_attention import multi_head, scaled_dot_product
from ftrain.bridge.token_dropout import drop_weights

F = nn.functional


def all_kept(shape, p):
    return torch.full(shape, p)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


SEEN = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
MASKS = {"none": {}, "bool": {"attn_mask": SEEN}, "numbers": {"attn_mask": draw(3, 5)}, "causal": {"is_causal": True}}


@pytest.mark.parametrize("mask", MASKS)
def test_scaled_dot_product_is_torchs(mask):
    q, kv, options = draw(2, 4, 3, 8), draw(2, 2, 5, 8), {**MASKS[mask], "scale": 0.3, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(q, kv, kv, **options)
    torch.testing.assert_close(scaled_dot_product(all_kept, q, kv, kv, dropout_p=0.5, **options), expected)


@pytest.mark.parametrize("width", [None, 6], ids=["one width", "keys of another"])
@pytest.mark.parametrize("rows", [2, None], ids=["rows", "one row"])
def test_multi_head_is_torchs(width, rows):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, dropout=0.5, kdim=width, vdim=width)
    nn.init.normal_(module.in_proj_bias)
    nn.init.normal_(module.out_proj.bias)
    own = () if rows is None else (rows,)
    q, kv = draw(3, *own, 8), draw(5, *own, width or 8)
    calls = []

    class Heard(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.multi_head_attention_forward:
                calls.append({**dict(zip(NAMES, args, strict=False)), **(kwargs or {})})
            return func(*args, **(kwargs or {}))

    with Heard():
        module(q, kv, kv)
    found, weights = multi_head(all_kept, F.multi_head_attention_forward, calls[0])
    expected, of_module = module.eval()(q, kv, kv)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights, of_module)


NAMES = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
         "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias")  # fmt: skip


def test_weights_are_dropped_with_their_probability_and_keep_their_mean():
    ones = torch.ones(2, 8, 64, 64)
    found = drop_weights(ftrain.key(0), ones, 0.25)
    torch.testing.assert_close(found.unique(), torch.tensor([0.0, 1 / 0.75]))
    for dims in [(0, 1, 2, 3), (0, 2, 3), (1, 2, 3)]:
        assert bool((found.mean(dims) - 1).abs().max() < 0.02)
    kept = (found > 0).double()
    assert float((kept[0, 0] * kept[0, 1]).mean()) == pytest.approx(0.75**2, abs=0.03)  # heads have their own
    assert float((kept[0] * kept[0].mT).mean()) == pytest.approx(0.75**2, abs=0.03)  # a pair is not the pair turned
    assert not torch.equal(found, drop_weights(ftrain.key(1), ones, 0.25))


def test_a_pair_of_tokens_has_its_number_whatever_the_rows():
    rows = drop_weights(ftrain.key(0), torch.ones(2, 3, 8, 8), 0.5)
    pack = drop_weights(ftrain.key(0), torch.ones(1, 3, 16, 16), 0.5)
    assert torch.equal(rows[0], pack[0, :, :8, :8])
    assert torch.equal(rows[1], pack[0, :, 8:, 8:])
