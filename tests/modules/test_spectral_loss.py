"""The distance of spectra: of a formula, of the part of a recording that counts alone, with finite gradients."""

import numpy as np
import pytest
import torch

from ftrain.modules.log_mel import mel_filters
from ftrain.modules.spectral_loss import SpectralConfig, spectral_terms

SMALL = SpectralConfig(8000, sizes=(32, 64))


def waves(samples=200, seed=0):
    return torch.randn(2, 1, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_formula_over_windows_that_count():
    made, given, samples = waves(), waves(seed=1), [200, 120]
    terms = spectral_terms(made, given, SMALL, torch.tensor(samples))
    window, filters = np.hanning(65)[:64], mel_filters(8000, 64, 10)
    found = []
    for row, count in enumerate(samples):
        for start in range(0, count - 63, 16):
            spectra = [np.abs(np.fft.rfft(x[row, 0, start : start + 64].numpy() * window)) for x in (made, given)]
            logs = [np.log10(np.maximum(np.sqrt(x**2 + 1e-10) @ filters, 1e-5)) for x in spectra]
            found.append(np.abs(logs[0] - logs[1]).mean())
    assert terms["spectrum_64"].count == len(found)
    assert terms["spectrum_64"].item() == pytest.approx(np.mean(found), rel=1e-6)


def test_what_does_not_count_is_not_read():
    made, given = waves(), waves(seed=1)
    beyond = made.clone()
    beyond[1, :, 120:] = 7
    one, other = (spectral_terms(x, given, SMALL, torch.tensor([200, 120])) for x in (made, beyond))
    assert [x.item() for x in one.values()] == [x.item() for x in other.values()]


def test_a_recording_shorter_than_a_window_counts_nothing_there():
    terms = spectral_terms(waves(40), waves(40, seed=1), SMALL, torch.tensor([40, 40]))
    assert (terms["spectrum_64"].count, terms["spectrum_64"].item()) == (0, 0)
    assert terms["spectrum_32"].count == 4


def test_silence_has_finite_gradients():
    made = torch.zeros(1, 1, 100, requires_grad=True)
    sum(x.value() for x in spectral_terms(made, torch.zeros(1, 1, 100), SMALL, torch.tensor([100])).values()).backward()
    assert torch.isfinite(made.grad).all()
    made = waves(64).requires_grad_()
    given = waves(64, seed=1)
    assert torch.autograd.gradcheck(
        lambda x: spectral_terms(x, given, SMALL, torch.tensor([64, 64]))["spectrum_64"].value(), made, atol=1e-6
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="are of two shapes"):
        spectral_terms(waves(), waves(100), SMALL, torch.tensor([200, 120]))
    with pytest.raises(ValueError, match="need windows of at least 16 samples, multiples of 4"):
        SpectralConfig(8000, sizes=(30,))
