"""Picture tokenizers equal their originals for the same weights: Janus's (VQ-16) and MoVQGAN."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import mse_loss, normalize

import ftrain
from ftrain.modules import spec, vq_image
from ftrain.modules.families import vq_model
from ftrain.modules.families.picture_codecs import codec_tensors, janus_codec
from ftrain.modules.vq_image import VqConfig
from tests.helpers.text_families import require_equal_gradients

transformers = pytest.importorskip("transformers", minversion="5.24")

JANUS = {
    "embed_dim": 4, "num_embeddings": 12, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 2],
    "num_res_blocks": 1, "num_patches": 4,
}  # fmt: skip


def images(count=2, size=8):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.copy_(float("norm" in name) * 0.5 + torch.randn(leaf.shape, generator=generator) * 0.1)
    return model


def tree_of(cfg, tensors, names):
    """Our tree of these tensors, of which none is left over."""
    leaves = {}
    for name, leaf in names.items():
        shape = dict(spec.leaves_with_paths(vq_image.specs(cfg)))[leaf].shape
        leaves[leaf] = tensors[name].detach().clone().reshape(shape)
    assert set(tensors) == set(names)
    return spec.map_with_paths(lambda path, _: leaves[path], vq_image.specs(cfg))


def gradients_of(model):
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def janus():
    from transformers.models.janus.modeling_janus import JanusVQVAE

    config = transformers.JanusVQVAEConfig(**JANUS)
    model = randomised(JanusVQVAE(config).float().eval())
    cfg = janus_codec(config.to_dict(), grid=4)
    names = {found.name: found.leaf for found in codec_tensors(cfg, "vq", "it")}
    return model, cfg, {name[3:]: leaf[3:] for name, leaf in names.items()}


def test_janus_encodes_and_decodes_as_transformers_does(janus):
    model, cfg, names = janus
    params = tree_of(cfg, dict(model.named_parameters()), names)
    wanted = model.quant_conv(model.encoder(images()))
    torch.testing.assert_close(vq_image.latent_grid(params, images(), cfg=cfg), wanted, rtol=0, atol=2e-5)
    codes = torch.randint(0, 12, (2, 16), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(vq_image.decode(params, codes, cfg=cfg), model.decode(codes), rtol=0, atol=2e-5)


def test_janus_is_trained_as_llamagen_was(janus):
    """Latents and entries of length one, the commitment weighed, the decoder's gradient straight through."""
    model, cfg, names = janus
    params = tree_of(cfg, dict(model.named_parameters()), names)
    grads, loss = torch.func.grad_and_value(lambda p: vq_image.loss(p, images(), cfg=cfg)[0].value())(params)
    latent = normalize(model.quant_conv(model.encoder(images())), dim=1).permute(0, 2, 3, 1)
    book = normalize(model.quantize.embedding.weight, dim=-1)
    entry = book[torch.cdist(latent.reshape(-1, 4), book).argmin(1)].view_as(latent)
    straight = latent + (entry - latent).detach()
    back = model.decoder(model.post_quant_conv(straight.permute(0, 3, 1, 2)))
    wanted = mse_loss(back, images()) + mse_loss(entry, latent.detach()) + 0.25 * mse_loss(latent, entry.detach())
    assert abs(loss.item() - wanted.item()) < 2e-5
    model.zero_grad()
    wanted.backward()
    require_equal_gradients(grads, tree_of(cfg, gradients_of(model), names), within=1e-4)


def test_movqgan_is_that_of_diffusers():
    """Codes' entries scale and shift the decoder's norms; loss and every gradient, with the weights of its losses."""
    diffusers = pytest.importorskip("diffusers")
    model = randomised(
        diffusers.VQModel(
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), block_out_channels=(32, 64),
            layers_per_block=1, latent_channels=4, num_vq_embeddings=12, vq_embed_dim=4, norm_type="spatial",
        )
    )  # fmt: skip
    given = {"_class_name": vq_model.CLASS, **model.config}
    cfg = replace(vq_model.config(given, grid=4), commitment=1.0, pull=0.25)
    names = {found.name: found.leaf for found in vq_model.names(cfg)}
    params = tree_of(cfg, dict(model.named_parameters()), names)
    latents = model.encode(images()).latents
    torch.testing.assert_close(vq_image.latent_grid(params, images(), cfg=cfg), latents, rtol=0, atol=2e-5)
    grads, loss = torch.func.grad_and_value(lambda p: vq_image.loss(p, images(), cfg=cfg)[0].value())(params)
    back, pull = model.decode(latents, return_dict=False)
    wanted = mse_loss(back, images()) + pull
    assert abs(loss.item() - wanted.item()) < 2e-5
    wanted.backward()
    require_equal_gradients(grads, tree_of(cfg, gradients_of(model), names), within=1e-4)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"channel_multiplier": [2, 2]}, r"channel_multiplier=\[2, 2\] must begin with 1"),
        ({"double_latent": True}, "double_latent=True is not understood"),
        ({"dropout": 0.1}, "dropout=0.1 is not understood"),
        ({"embed_dim": 0}, "embed_dim=0 must be a whole number of at least 1"),
    ],
)
def test_a_tokenizer_that_nobody_computes_is_refused(entry, says):
    with pytest.raises(ValueError, match=says):
        janus_codec({**JANUS, **entry}, grid=4)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL' is no VQModel"),
        ({"block_out_channels": [64, 0]}, r"block_out_channels=\[64, 0\] must be whole numbers"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "attention at different resolutions"),
        ({"down_block_types": ["DownBlock2D", "DownBlock2D"]}, r"down_block_types=\['DownBlock2D'.* must be 2 of"),
        ({"norm_type": "spatial", "norm_num_groups": 16}, "norm_type='spatial' with norm_num_groups=16"),
        ({"act_fn": "gelu"}, "act_fn='gelu'; the networks here compute 'silu'"),
        ({"lookup_from_codebook": True}, "lookup_from_codebook=True is not understood"),
    ],
)
def test_a_tokenizer_of_diffusers_that_nobody_computes_is_refused(entry, says):
    with pytest.raises(ValueError, match=says):
        vq_model.config({"_class_name": "VQModel", "block_out_channels": [64, 64], **entry}, grid=4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"networks": "movq"}, "latent=0 with networks='movq'"),
        ({"attention": (2,)}, "attention names resolution 2 of 2"),
    ],
)
def test_options_that_contradict_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        VqConfig(size=8, widths=(8, 8), **options)


def test_a_codebook_that_follows_averages_has_no_gradient():
    cfg = VqConfig(size=8, widths=(8, 8), codes=8, d_code=4, pull=0.0, normalise=False)
    params = ftrain.init(vq_image.specs(cfg), ftrain.key(0))
    grads = torch.func.grad(lambda p: vq_image.loss(p, images(), cfg=cfg)[0].value())(params)
    assert not grads["codebooks_QKZ"].any()
    assert all(leaf.any() for path, leaf in spec.leaves_with_paths(grads) if path.endswith("w_OIhw"))
