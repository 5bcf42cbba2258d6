"""The residual audio codec equals transformers' for the same weights: latents, codes, audio, gradients."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ftrain.modules import spec
from ftrain.modules.families import mimi, mimi_config
from tests.helpers import tiny_mimi
from tests.helpers.tiny_mimi import OTHER, TINY, audio

pytest.importorskip("transformers")
KINDS = {"plain": TINY, "other": OTHER}


@functools.cache
def tiny(kind, seed=0):
    made = tiny_mimi.module(KINDS[kind], seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        return made, *tiny_mimi.ours(Path(folder), KINDS[kind])


@pytest.mark.parametrize(("samples", "seed"), [(96, 0), (101, 1), (5, 0), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_codes_and_audio_are_those_of_transformers(kind, samples, seed):
    made, cfg, params, state = tiny(kind, seed)
    given = audio(samples, channels=cfg.convs.channels, seed=seed)
    with torch.no_grad():
        wanted = made.encoder(given).latents
        found = mimi.latents(params, given, cfg)
        assert found.shape == (2, cfg.convs.d_out, cfg.frames(samples))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
        codes = made.encode(given).audio_codes
        assert torch.equal(mimi.encode(params, state, given, cfg), codes)
        made_again = made.decode(codes).audio_values
        torch.testing.assert_close(mimi.decode(params, state, codes, cfg), made_again, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_some_of_the_levels_are_those_of_transformers(kind):
    made, cfg, params, state = tiny(kind)
    given = audio(channels=cfg.convs.channels)
    for levels in (cfg.semantic, 3):
        codes = made.encode(given, num_quantizers=levels).audio_codes
        assert codes.shape[1] == levels
        assert torch.equal(mimi.encode(params, state, given, cfg, levels=levels), codes)
        wanted = made.decode(codes).audio_values
        torch.testing.assert_close(mimi.decode(params, state, codes, cfg), wanted, rtol=0, atol=2e-5)


def on_disk(name):
    """What transformers writes of a parameter in memory."""
    half, _, rest = name.partition(".")
    return name if half == "quantizer" else rest.replace("_seanet", "")


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_is_that_of_transformers(kind):
    """Of latents by the encoder's parameters, and of the audio that codes become by those of the decoder."""
    made, cfg, params, state = tiny(kind)
    given, codes = audio(channels=cfg.convs.channels), torch.randint(0, 8, (2, 4, 9))
    leaves = spec.map_with_paths(lambda _, x: x.clone().requires_grad_(), params)
    (mimi.latents(leaves, given, cfg).square().mean() + mimi.decode(leaves, state, codes, cfg).sin().mean()).backward()
    made.zero_grad()
    (made.encoder(given).latents.square().mean() + made.decode(codes).audio_values.sin().mean()).backward()
    theirs = {on_disk(name): p.grad for name, p in made.named_parameters()}
    ours = dict(spec.leaves_with_paths(spec.map_with_paths(lambda _, x: x.grad, leaves)))
    compared = [one for one in mimi.names(cfg) if not one.leaf.startswith("state.") and "input_proj" not in one.name]
    for one in compared:  # codes have no gradient, so what makes rows of latents has none
        wanted, found = theirs[one.name], ours[one.leaf].mT if one.transposed else ours[one.leaf]
        assert float((found - wanted).norm()) < 1e-4 * float(wanted.norm()) + 1e-9, one.name
    assert len(compared) + 2 * ("quantizer" in params) == len(theirs)


def test_what_stands_behind_a_recording_changes_nothing_in_it():
    _, cfg, params, state = tiny("plain")
    batch = mimi.recordings([np.random.randn(48), np.random.randn(96)], rate=1200, cfg=cfg)
    alone = mimi.encode(params, state, batch["audio"][:1, :, :48], cfg)
    assert torch.equal(mimi.encode(params, state, batch["audio"], cfg)[:1, :, : cfg.frames(48)], alone)
    assert batch["samples"].tolist() == [48, 96]


def test_the_published_codec_has_its_size():
    from transformers import MimiConfig, MimiModel

    with torch.device("meta"):
        theirs = MimiModel(MimiConfig())
    cfg = mimi_config.config({})
    assert spec.count(mimi.specs(cfg)) == sum(p.numel() for p in theirs.parameters())
    assert (cfg.frame, cfg.rate / cfg.frame) == (1920, 12.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_causal_conv": False}, "use_causal_conv=False, which our codec does not have"),
        ({"pad_mode": "reflect"}, "pad_mode='reflect', which our codec does not have"),
        ({"decoder_config": None}, "decoder_config=None, which our codec does not have: it is whole"),
        ({"codebook_dim": 4}, "codebook_dim=4 is not vector_quantization_hidden_dimension=8"),
        ({"num_semantic_quantizers": 4}, "of 4 levels 4 are semantic; need both kinds"),
        ({"frame_rate": 200}, r"frame_rate=200 must be half of 200\.0 frames a second, or less"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 is more than 4096"),
        ({"quantiles": 3}, "quantiles=3 is not understood"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        mimi_config.config({**TINY, **change})


@pytest.mark.parametrize(
    ("waves", "rate", "message"),
    [
        ([np.zeros(9)], 16_000, "16000 samples a second: the codec takes 1200; resample"),
        ([np.zeros(9), np.zeros(0)], 1200, r"recording 1 is \[0\]: the codec takes 1 channels \[C, S\], S > 0"),
        ([np.zeros((2, 9))], 1200, r"recording 0 is \[2, 9\]: the codec takes 1 channels"),
        ([np.zeros(9, np.int16)], 1200, r"recording 0 is of int16: give numbers in \[-1, 1\]"),
        ([np.full(9, np.nan)], 1200, "recording 0 has numbers that are not finite"),
        ([], 1200, "there are no recordings"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(waves, rate, message):
    with pytest.raises(ValueError, match=message):
        mimi.recordings(waves, rate=rate, cfg=tiny("plain")[1])


def test_samples_and_codes_that_do_not_fit_are_refused():
    _, cfg, params, state = tiny("plain")
    with pytest.raises(ValueError, match=r"audio \[1, 2, 9\]: the codec takes samples \[B, 1, S\]"):
        mimi.latents(params, torch.zeros(1, 2, 9), cfg)
    with pytest.raises(ValueError, match=r"audio is torch\.int64: the codec takes numbers"):
        mimi.latents(params, torch.zeros(1, 1, 9, dtype=torch.int64), cfg)
    with pytest.raises(ValueError, match="levels=5: the codec has 4, of which 1 go together"):
        mimi.encode(params, state, audio(), cfg, levels=5)
    with pytest.raises(ValueError, match=r"codes \[1, 5, 2\] of torch.int64: .* of 1 to 4 levels"):
        mimi.decode(params, state, torch.zeros(1, 5, 2, dtype=torch.int64), cfg)
    with pytest.raises(ValueError, match="token 8 at index 0 is outside the vocabulary of 8"):
        mimi.decode(params, state, torch.full((1, 4, 2), 8), cfg)
