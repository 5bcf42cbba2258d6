"""Folders of Wan's video autoencoder: the library's own model, trained in a step, in and out to the byte."""

import filecmp

import pytest
import torch

import ftrain
from ftrain.bridge.native_wan_vae import native_wan_vae
from ftrain.modules.families import wan_vae
from ftrain.sharding import Mesh
from tests.helpers import mesh_models, tiny_wan_vae
from tests.helpers.tiny_wan_vae import RESIDUAL, TINY, video

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("told", [TINY, RESIDUAL], ids=["plain", "residual"])
def test_a_folder_goes_in_and_comes_out_to_the_byte(told, tmp_path):
    made = tiny_wan_vae.module(told)
    made.save_pretrained(tmp_path / "in")
    model = ftrain.hf.open(tmp_path / "in")
    assert model.why == "native: Wan's video autoencoder is a family of the library"
    params = model.load()
    model.save(params, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "in").iterdir())
    assert filecmp.cmpfiles(tmp_path / "in", tmp_path / "out", files, shallow=False) == (files, [], [])
    with torch.no_grad():
        latents = made.encode(video()).latent_dist.mode()
    torch.testing.assert_close(model.hidden(params, {"video": video()}), (latents - 0.5) / 2, rtol=0, atol=1e-5)
    again = ftrain.init(model.specs, ftrain.key(0))
    assert model.load(again) is again


SMALL = {**TINY, "dim_mult": [1, 2], "temperal_downsample": [True]}


def drawn(model):
    """Videos, a loss of them that draws latents, and the key."""
    given = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def loss(params, batch):
        found = model.loss(params, {"video": batch["video"]}, key=batch["key"])
        return found, {"loss": found}

    return mesh_models.Model(model.specs, loss, lambda packs: {"video": given, "key": ftrain.key(3)}, {})


def test_the_loss_is_that_of_the_formula():
    model = native_wan_vae(SMALL)
    case = drawn(model)
    params, batch, cfg = case.params(torch.float64), case.batch(1), wan_vae.config(SMALL)
    given = batch["video"].double()
    mean, log_variance = wan_vae.encode(params, given, cfg)
    noise = ftrain.normal(batch["key"], tuple(mean.shape)).double()
    frames = wan_vae.decode(params, mean + (log_variance / 2).exp() * noise, cfg)
    beyond = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
    wanted = (frames - given).square().mean() + 1e-6 * beyond
    torch.testing.assert_close(case.loss(params, batch)[0].value(), wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(model.outputs(params, {"video": given}, batch["key"]), frames)


@pytest.mark.exhaustive
def test_a_step_that_draws_latents_is_the_same_on_a_mesh():
    """Divided by videos; the noise is that of one device."""
    case = drawn(native_wan_vae(SMALL))
    plan = mesh_models.plan_for(case, Mesh(shard=2, kind="virtual"))
    value, gradients = mesh_models.compare(case, plan, dtype=torch.float64)
    assert value < 1e-12
    assert gradients < 1e-10


@pytest.mark.parametrize(
    ("batch", "message"),
    [({"frames": video()}, "has 'frames', which it does not read; it reads video"), ({}, "has no 'video'")],
)
def test_batches_that_do_not_fit_are_refused(batch, message):
    model = native_wan_vae(TINY)
    with pytest.raises(ValueError, match=message):
        model.loss(ftrain.init(model.specs, ftrain.key(0)), batch)


def test_another_class_is_refused():
    with pytest.raises(ValueError, match="_class_name='AutoencoderKL' is no video autoencoder of Wan's"):
        native_wan_vae({**TINY, "_class_name": "AutoencoderKL"})
