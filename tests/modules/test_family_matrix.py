"""What holds for every family: initial values, recompute, meshes, no second trace; of decoders files and caches too.

Vision and audio encoders and the image decoder are parts of the omni model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ftrain
from ftrain import tree
from ftrain.hf import load_hf, save_hf
from ftrain.kernels.mean import Mean
from ftrain.modules import decoder, spec, vq_image
from ftrain.modules.hf_config import hf_config
from ftrain.modules.hf_names import decoder_names
from ftrain.sharding import BatchRows, Mesh
from tests.helpers.mesh_models import Model, compare, dense, diffusion, mixture, omni, plan_for


def image_tokens() -> Model:
    """The tokenizer of images, with a residual codebook of two levels."""
    cfg = vq_image.VqConfig(size=8, channels=1, widths=(8, 8), codes=8, d_code=4, groups=4, depth=2, normalise=False)

    def loss(params: Any, batch: Any) -> tuple[Mean, Any]:
        images = batch["images_BCHW"].to(params["codebooks_QKZ"].dtype)
        found, terms, _ = vq_image.loss(params, images, cfg=cfg)
        return found, terms

    def batch(packs: int) -> dict[str, Any]:
        return {"images_BCHW": torch.randn(2 * packs, 1, 8, 8, generator=torch.Generator().manual_seed(3))}

    return Model(vq_image.specs(cfg), loss, batch, {"images_BCHW": BatchRows()})


FAMILIES: dict[str, Callable[[], Model]] = {
    "dense": dense,
    "mixture": mixture,
    "omni": omni,
    "diffusion": diffusion,
    "image tokens": image_tokens,
}
DECODERS = ("llama-tiny", "qwen3-moe-tiny")
"""Presets of the families that generate and that Hugging Face has files of."""


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Model:
    return FAMILIES[request.param]()


def test_initial_values_come_from_the_key_alone(model: Model) -> None:
    made, again, other = (ftrain.init(model.specs, ftrain.key(n)) for n in (0, 0, 1))
    assert tree.diff(spec.abstract(model.specs), tree.map(lambda p: p.to("meta"), made)) == ""
    assert sum(leaf.numel() for leaf in tree.leaves(made)) == spec.count(model.specs)
    for path, a, b, c in zip(tree.paths(made), *map(tree.leaves, (made, again, other)), strict=True):
        assert torch.isfinite(a).all(), path
        assert torch.equal(a, b), path
        assert torch.equal(a, c) == bool((a == a.flatten()[0]).all()), f"{path}: constants alone do not see the key"


@pytest.fixture(scope="module")
def step(model: Model) -> ftrain.Step:
    return ftrain.jit(model.step)


def test_recompute_of_layers_changes_no_bit(model: Model, step: ftrain.Step) -> None:
    params, batch = model.params(torch.float32), model.batch(1)
    plain = step(params, batch)
    again = ftrain.jit(model.step, remat="layer" if "layers" in model.specs else "all")(params, batch)
    for path, a, b in zip(tree.paths(plain), tree.leaves(plain), tree.leaves(again), strict=True):
        assert torch.equal(a, b), path


@pytest.mark.parametrize("mesh", [Mesh(shard=3, kind="virtual")], ids=str)
def test_a_mesh_gives_what_one_device_gives(model: Model, mesh: Mesh) -> None:
    loss, gradients = compare(model, plan_for(model, mesh), dtype=torch.float64)
    assert loss < 1e-12
    assert gradients < 1e-11


def test_other_numbers_of_the_same_shapes_are_not_traced_again(model: Model, step: ftrain.Step) -> None:
    params = model.params(torch.float32)
    for n in range(3):
        step(params, tree.map(lambda x, n=n: x * (1 + n) if x.is_floating_point() else x, model.batch(1)))
    assert step.traces == 1


@pytest.mark.parametrize("name", DECODERS)
def test_files_of_hugging_face_give_back_every_bit(name: str, tmp_path: Path) -> None:
    cfg = decoder.preset(name)
    params = ftrain.init(decoder.specs(cfg), ftrain.key(2))
    save_hf(params, tmp_path, hf_config(cfg), decoder_names(cfg))
    back = load_hf(tmp_path, decoder.specs(cfg), decoder_names(cfg))
    for path, a, b in zip(tree.paths(params), tree.leaves(params), tree.leaves(back), strict=True):
        assert torch.equal(a, b), path


@pytest.mark.parametrize("name", DECODERS)
def test_tokens_one_by_one_through_the_cache_are_those_of_the_whole_text(name: str) -> None:
    cfg = decoder.preset(name)
    params = tree.map(lambda p: p.double(), ftrain.init(decoder.specs(cfg), ftrain.key(2)))
    tokens_T = torch.randint(0, cfg.vocab, (9,), generator=torch.Generator().manual_seed(0))
    x_TD, positions_T = decoder.embed(params, tokens_T), torch.arange(9)
    whole_TD, _ = decoder.apply(params, x_TD, positions=positions_T, segments=torch.zeros_like(positions_T), cfg=cfg)
    length_B = torch.tensor([4])
    found_TD, cache = decoder.prefill(params, x_TD[:4], positions=positions_T[:4], length_B=length_B, room=5, cfg=cfg)
    rows = [found_TD]
    for t in range(4, 9):
        newest_BD, cache = decoder.extend(params, x_TD[t : t + 1], positions=cache.length_B, cache=cache, cfg=cfg)
        rows.append(newest_BD)
    torch.testing.assert_close(torch.cat(rows), whole_TD, rtol=1e-9, atol=1e-9)
