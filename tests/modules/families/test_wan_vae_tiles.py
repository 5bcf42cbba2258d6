"""Tiles of Wan's video autoencoder are those of diffusers, and without overlap each is by itself."""

import pytest
import torch

from ftrain.modules.families import wan_vae
from ftrain.modules.families.wan_vae_tiles import decode_in_tiles, encode_in_tiles
from tests.helpers import tiny_wan_vae
from tests.helpers.tiny_wan_vae import RESIDUAL, TINY, video

pytest.importorskip("diffusers")


def test_latents_and_frames_in_tiles_are_those_of_diffusers():
    cfg, made = wan_vae.config(TINY), tiny_wan_vae.module(TINY)
    params, given = tiny_wan_vae.tree_of(dict(made.named_parameters()), cfg), video(5)
    made.enable_tiling(24, 24, 16, 16)
    with torch.no_grad():
        wanted = made.encode(given).latent_dist
        mean, log_variance = encode_in_tiles(params, given, cfg, tile=24, stride=16, frames=1)
        torch.testing.assert_close(mean, wanted.mode(), rtol=0, atol=1e-5)
        torch.testing.assert_close(log_variance, wanted.logvar, rtol=0, atol=1e-5)
        found = decode_in_tiles(params, mean, cfg, tile=24, stride=16)
        torch.testing.assert_close(found.clamp(-1, 1), made.decode(mean).sample, rtol=0, atol=2e-5)
        assert float((found - wan_vae.decode(params, mean, cfg)).abs().max()) > 1e-3


@pytest.mark.parametrize("told", [TINY, RESIDUAL], ids=["plain", "residual"])
def test_tiles_side_by_side_are_tiles_alone(told):
    cfg = wan_vae.config(told)
    params = tiny_wan_vae.tree_of(dict(tiny_wan_vae.module(told).named_parameters()), cfg)
    given = video(5)
    mean, _ = encode_in_tiles(params, given, cfg, tile=32, stride=32)
    found = decode_in_tiles(params, mean, cfg, tile=32, stride=32)
    alone = [wan_vae.encode(params, piece, cfg)[0] for piece in given.split([32, 16], 4)]
    torch.testing.assert_close(mean, torch.cat(alone, 4), rtol=0, atol=1e-5)
    frames = torch.cat([wan_vae.decode(params, latents, cfg) for latents in alone], 4)
    torch.testing.assert_close(found, frames, rtol=0, atol=1e-5)
    one, _ = encode_in_tiles(params, given, cfg)
    torch.testing.assert_close(one, wan_vae.encode(params, given, cfg)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tile", "stride"), [(20, 16), (16, 12), (16, 24), (16, 0)])
def test_tiles_of_other_sizes_are_refused(tile, stride):
    cfg = wan_vae.config(TINY)
    with pytest.raises(ValueError, match="both must be multiples of 8 pixels, and the stride no more than the tile"):
        decode_in_tiles({}, torch.zeros(1, 4, 1, 2, 2), cfg, tile=tile, stride=stride)
