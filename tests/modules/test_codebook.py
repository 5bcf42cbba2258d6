"""Codes of items: their numbers, what they name, and how evenly entries are used."""

import pytest
import torch

from ftrain.modules import codebook


def test_numbered_codes_name_the_rows_that_were_quantized() -> None:
    books_QKZ = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    found = codebook.quantize(torch.randn(24, 3, generator=torch.Generator().manual_seed(1)), books_QKZ)
    codes_BN = codebook.numbered(found.codes_QR, 8, 5)
    assert codes_BN.shape == (3, 16)
    assert torch.equal(codes_BN[1, 8:], found.codes_QR[1, 8:16] + 5)
    torch.testing.assert_close(codebook.rows_of(codes_BN, books_QKZ), found.entries_QRZ.sum(0))
    other_BN = torch.cat([codes_BN[:, 8:], codes_BN[:, :8] % 5], 1)  # each level's codes at the places of the other
    torch.testing.assert_close(codebook.rows_of(other_BN, books_QKZ), codebook.named(found.codes_QR.flip(0), books_QKZ))
    for none in (-1, 10):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            codebook.rows_of(torch.full((1, 2), none), books_QKZ)
    used_QK = codebook.usage(codes_BN, levels=2, entries=5)
    assert torch.equal(used_QK, torch.stack([codes.bincount(minlength=5) for codes in found.codes_QR]).float())


def test_terms_of_items_are_those_of_rows() -> None:
    found = codebook.quantize(torch.randn(24, 3), torch.randn(2, 5, 3))
    terms, all_R = codebook.item_terms(found, items=3), torch.ones(24, dtype=torch.bool)
    torch.testing.assert_close(terms["codebook"].value(), 2 * codebook.pull(found, all_R).value())
    torch.testing.assert_close(terms["commitment"].value(), 2 * codebook.commitment(found, all_R).value())


def test_perplexity_is_the_number_of_entries_that_share_evenly() -> None:
    used = torch.tensor([[4.0, 4.0, 4.0, 4.0, 0.0], [7.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 5])
    torch.testing.assert_close(codebook.perplexity(used), torch.tensor([4.0, 1.0, 1.0]))
