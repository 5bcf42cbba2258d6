"""Wan on meshes equals itself on one device; and its FLOPs are those of the published formula."""

import functools
from dataclasses import replace

import pytest
import torch

import ftrain
from experiments.wan_plan import forward_flops
from ftrain.bridge.native_wan import NativeWan
from ftrain.modules import spec
from ftrain.modules.families import wan
from ftrain.modules.families.wan_config import PUBLISHED, config
from ftrain.modules.families.wan_latents import lay, rules
from ftrain.modules.spec import Normal
from ftrain.sharding import Layout, Mesh, Ring, Ulysses
from tests.helpers import mesh_models
from tests.helpers.tiny_wan import TINY, WITH_IMAGE, clips


@functools.cache
def tiny(kind):
    """One layer, every gate open; for a mesh of p data ranks, p packs of clips with clean first frames."""
    cfg = config({**(WITH_IMAGE if kind == "image" else TINY), "num_layers": 1})
    specs = spec.map_with_paths(lambda _, s: replace(s, init=Normal(0.1)), wan.specs(cfg))
    made = NativeWan(cfg)

    def loss(params, batch):
        found = made.loss(params, batch)
        return found, {"flow": found}

    def batch(packs):
        given = clips(cfg, frame_times=True)
        return lay([given[number % 2 :] for number in range(packs)], cfg, multiple=4)

    return mesh_models.Model(specs, loss, batch, rules(cfg))


@pytest.mark.parametrize(
    ("kind", "mesh", "how"),
    [
        ("text", Mesh(sequence=2, kind="virtual"), Ring()),
        ("image", Mesh(shard=2, sequence=2, kind="virtual"), Ulysses()),
        pytest.param("image", Mesh(shard=2, kind="virtual"), Ulysses(), marks=pytest.mark.exhaustive),
        pytest.param("text", Mesh(sequence=2, kind="virtual"), Ulysses(), marks=pytest.mark.exhaustive),
    ],
)
def test_a_mesh_gives_what_one_device_gives(kind, mesh, how):
    model = tiny(kind)
    loss, gradients = mesh_models.compare(
        model, mesh_models.plan_for(model, mesh, Layout(sequence=how)), dtype=torch.float64
    )
    assert loss < 1e-12
    assert gradients < 1e-11


ROWS = {"480 x 832, 81 frames": 21 * 30 * 52, "720 x 1280, 81 frames": 21 * 45 * 80}


def abstract(cfg, n):
    """The batch of one clip of n rows, without memory."""
    empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    pictures = {"image": empty(257, cfg.d_image)} if cfg.d_image else {}
    return {
        "latents": empty(n, cfg.row_in), "times": empty(1), "positions": empty(n, 3, dtype=torch.int64),
        "text": empty(cfg.text_rows, cfg.d_text), "target": empty(n, cfg.row_out), **pictures,
    }  # fmt: skip


PUBLISHED_FORWARD = {
    ("2.1-t2v-1.3b", "480 x 832, 81 frames"): 283.0e12,
    ("2.1-t2v-1.3b", "720 x 1280, 81 frames"): 1249.8e12,
    ("2.1-t2v-14b", "480 x 832, 81 frames"): 1678.4e12,
    ("2.1-t2v-14b", "720 x 1280, 81 frames"): 6523.4e12,
    ("2.1-i2v-14b", "480 x 832, 81 frames"): 1686.4e12,
    ("2.1-i2v-14b", "720 x 1280, 81 frames"): 6540.5e12,
}


def test_the_formula_gives_the_published_numbers():
    for (name, shape), wanted in PUBLISHED_FORWARD.items():
        assert sum(forward_flops(config(PUBLISHED[name]), ROWS[shape])) == pytest.approx(wanted, rel=1e-4), name


@pytest.mark.parametrize(
    ("name", "shape"), [("2.1-t2v-1.3b", "480 x 832, 81 frames"), ("2.1-i2v-14b", "720 x 1280, 81 frames")]
)
def test_flops_of_a_step_are_those_of_the_formula(name, shape):
    """Of one layer in full size, from the specs alone. Backward takes two of each product of the forward pass, but for
    what needs no gradient (latents, text, pictures, times), and two and a half of attention, which makes its scores
    again.
    """
    cfg, n = replace(config(PUBLISHED[name]), layers=1), ROWS[shape]
    step = ftrain.jit(ftrain.value_and_grad(NativeWan(cfg).loss), precision="bf16")
    cost = step.lower(spec.abstract(wan.specs(cfg)), abstract(cfg, n)).cost()
    products, attention = forward_flops(cfg, n)
    assert cost.unpriced == ()
    assert cost.by_phase["forward"] == products + attention
    no_gradient = 2 * cfg.d_model * (n * cfg.row_in + cfg.text_rows * cfg.d_text + cfg.time_features)
    assert cost.by_phase["backward"] == 2 * products - no_gradient + 5 * attention // 2
