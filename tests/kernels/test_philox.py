"""The generator: published vectors, and numbers from words."""

import pytest
import torch

from ftrain.kernels import philox

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
@pytest.mark.parametrize("as_word", [lambda text: torch.tensor([int(text, 16)]), lambda text: int(text, 16)])
def test_published_vectors(counter, key, expected, as_word):
    """`kat_vectors` of the Random123 distribution, philox4x32 with 10 rounds; in tensors and in Python ints."""
    words = philox.philox_words(*(tuple(as_word(word) for word in text.split()) for text in (counter, key)))
    assert [int(word) for word in words] == [int(word, 16) for word in expected.split()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_words_give_finite_numbers_inside_the_range(dtype):
    extremes = torch.tensor([[0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0x80000000, 0, 0x7FFFFFFF, 0xFFFFFFFF]])
    u = philox.numbers_of_words(extremes, "uniform", dtype, 0.0)
    assert float(u.min()) == 0.0
    assert float(u.max()) < 1.0
    z = philox.numbers_of_words(extremes, "normal", dtype, 0.0)
    assert z.isfinite().all()
    assert float(z.max()) == -float(z.min()) == pytest.approx(8.2 if dtype == torch.float64 else 6.34, abs=0.1)
    bounded = philox.numbers_of_words(extremes, "normal", dtype, 2.0)
    assert float(bounded.abs().max()) == pytest.approx(2.0)
    assert float(bounded.abs().max()) <= 2.0
