"""Wan's video autoencoder equals diffusers' for the same weights: latents, frames, gradients; whole or in pieces."""

import functools

import pytest
import torch

from ftrain.modules import spec
from ftrain.modules.families import wan_vae
from ftrain.modules.families.wan_vae import WanVaeConfig
from tests.helpers import tiny_wan_vae
from tests.helpers.tiny_wan import relative
from tests.helpers.tiny_wan_vae import RESIDUAL, TINY, video

pytest.importorskip("diffusers")
KINDS = {"plain": TINY, "residual": RESIDUAL}


@functools.cache
def tiny(kind):
    cfg, made = wan_vae.config(KINDS[kind]), tiny_wan_vae.module(KINDS[kind])
    return cfg, made, tiny_wan_vae.tree_of(dict(made.named_parameters()), cfg)


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_frames_are_those_of_diffusers(kind, frames):
    cfg, made, params = tiny(kind)
    given = video(frames, videos=2)
    with torch.no_grad():
        wanted = made.encode(given).latent_dist
        mean, log_variance = wan_vae.encode(params, given, cfg)
        assert mean.shape == (2, 4, 1 + (frames - 1) // 4, 32 // cfg.space_factor, 48 // cfg.space_factor)
        torch.testing.assert_close(mean, wanted.mode(), rtol=0, atol=1e-5)
        torch.testing.assert_close(log_variance, wanted.logvar, rtol=0, atol=1e-5)
        found = wan_vae.decode(params, mean, cfg)
        assert float((found.abs() < 1).float().mean()) > 0.5
        torch.testing.assert_close(found.clamp(-1, 1), made.decode(mean).sample, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_of_training_is_that_of_diffusers(kind):
    """Of a reconstruction through both halves; ours takes all frames at once, and diffusers one latent frame."""
    cfg, made, params = tiny(kind)
    given = video(5)
    leaves = spec.map_with_paths(lambda _, x: x.clone().requires_grad_(), params)
    mean, log_variance = wan_vae.encode(leaves, given, cfg)
    loss = (wan_vae.decode(leaves, mean, cfg).clamp(-1, 1) - given).square().mean() + log_variance.mean()
    loss.backward()
    made.zero_grad()
    posterior = made.encode(given).latent_dist
    ((made.decode(posterior.mode()).sample - given).square().mean() + posterior.logvar.mean()).backward()
    theirs = tiny_wan_vae.tree_of({name: p.grad for name, p in made.named_parameters()}, cfg)
    for path, error in relative(spec.map_with_paths(lambda _, x: x.grad, leaves), theirs).items():
        assert error < 1e-4, path


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_what_the_whole_is(kind, frames):
    cfg, _, params = tiny(kind)
    params = spec.map_with_paths(lambda _, x: x.double(), params)
    given = video(17).double()
    mean, _ = wan_vae.encode(params, given, cfg)
    torch.testing.assert_close(wan_vae.encode(params, given, cfg, frames=frames)[0], mean, rtol=0, atol=1e-12)
    whole = wan_vae.decode(params, mean, cfg)
    torch.testing.assert_close(wan_vae.decode(params, mean, cfg, frames=frames), whole, rtol=0, atol=1e-12)


def test_a_latent_frame_depends_on_no_later_frame():
    cfg, _, params = tiny("plain")
    given = video(9)
    changed = torch.cat([given[:, :, :5], -given[:, :, 5:]], 2)
    one, other = (wan_vae.encode(params, x, cfg)[0] for x in (given, changed))
    assert torch.equal(one[:, :, :2], other[:, :, :2])
    assert not torch.equal(one[:, :, 2:], other[:, :, 2:])


def test_the_published_autoencoder_has_its_size():
    assert spec.count(wan_vae.specs(WanVaeConfig())) == 126_892_531
    assert (WanVaeConfig().time_factor, WanVaeConfig().space_factor) == (4, 8)


def test_latents_are_scaled_and_back():
    cfg = wan_vae.config(TINY)
    latents = torch.randn(1, 4, 2, 3, 3)
    assert wan_vae.scaled(latents, cfg)[0, 0, 0, 0, 0] == (latents[0, 0, 0, 0, 0] - 0.5) / 2
    torch.testing.assert_close(wan_vae.unscaled(wan_vae.scaled(latents, cfg), cfg), latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_scales": [0.5]}, r"attn_scales=\[0.5\], which our autoencoder does not have"),
        ({"temperal_downsample": [True]}, "4 levels need 3 of halve_time"),
        ({"z_dim": 8}, "8 channels of latents need as many means and deviations, not 4 and 4"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal=8, and its levels give 4"),
        ({"quantile": 3}, "quantile=3 is not understood"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        wan_vae.config({**TINY, **change})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 3, 8, 32, 48), r"8 frames of 32 x 48: .* takes 4 k \+ 1 frames .* cut it to 5 frames"),
        (torch.zeros(1, 3, 5, 30, 48), "multiples of 8 rows and columns; cut it to 5 frames of 24 x 48"),
        (torch.zeros(1, 4, 5, 32, 48), "a video of 4 channels, and the autoencoder takes 3"),
    ],
)
def test_videos_that_do_not_fit_are_refused(given, message):
    cfg, _, params = tiny("plain")
    with pytest.raises(ValueError, match=message):
        wan_vae.encode(params, given, cfg)
    with pytest.raises(ValueError, match="latents of 3 channels, and the autoencoder has 4"):
        wan_vae.decode(params, torch.zeros(1, 3, 1, 2, 2), cfg)
    with pytest.raises(ValueError, match="frames=0 at a time must be at least 1"):
        wan_vae.decode(params, torch.zeros(1, 4, 1, 2, 2), cfg, frames=0)
