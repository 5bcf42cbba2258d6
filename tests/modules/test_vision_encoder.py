"""The vision encoder: what a patch holds and where it is, items side by side, images and videos alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.kernels import random
from ftrain.modules import spec, vision_encoder
from ftrain.modules.vision_encoder import VisionConfig

IMAGE = VisionConfig(d_model=24, layers=2, heads=2, d_out=10, patch=2, channels=3, merge=2)
VIDEO = VisionConfig(d_model=24, layers=2, heads=2, d_out=10, patch=2, channels=3, merge=2, frames=2)
SINGLE = VisionConfig(d_model=24, layers=1, heads=2, d_out=10, patch=3, channels=3, merge=1)


@given(
    cfg=st.sampled_from([IMAGE, VIDEO, SINGLE]),
    frames=st.integers(1, 5),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
)
@settings(deadline=None, max_examples=40)
def test_each_patch_holds_the_pixels_at_its_position(cfg: VisionConfig, frames: int, height: int, width: int) -> None:
    video = np.random.default_rng(0).normal(size=(frames, height, width, 3)).astype(np.float32)
    features = vision_encoder.patchify(video, cfg=cfg)
    side, p, f = cfg.patch * cfg.merge, cfg.patch, cfg.frames
    whole = (-(-frames // f), -(-height // side) * cfg.merge, -(-width // side) * cfg.merge)
    assert len(features["positions_N3"]) == np.prod(whole)
    assert len(np.unique(features["positions_N3"], axis=0)) == np.prod(whole)
    full = np.concatenate([video, np.repeat(video[-1:], -frames % f, axis=0)])
    full = np.pad(full, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
    for patch, (t, y, x) in zip(features["patches_NP"], features["positions_N3"], strict=True):
        block = full[t * f : t * f + f, y * p : y * p + p, x * p : x * p + p]
        np.testing.assert_array_equal(patch, block.ravel())


@pytest.mark.parametrize("cfg", [IMAGE, VIDEO, SINGLE])
def test_the_patches_of_a_token_are_one_square(cfg: VisionConfig) -> None:
    positions = vision_encoder.patchify(np.zeros((4, 12, 24, 3)), cfg=cfg)["positions_N3"]
    squares = positions.reshape(-1, cfg.rows_per_token, 3) // np.array([1, cfg.merge, cfg.merge])
    assert (squares == squares[:, :1]).all()
    order = np.ravel_multi_index(squares[:, 0].T, squares.max((0, 1)) + 1)
    assert (np.diff(order) == 1).all()


def packed(*items: dict[str, np.ndarray], padding: int = 0) -> dict[str, torch.Tensor]:
    """Items joined as modules/packing.py joins them."""
    rows = [len(item["patches_NP"]) for item in items]
    arrays = {name: np.concatenate([item[name] for item in items]) for name in items[0]}
    arrays = {name: np.pad(array, ((0, padding), (0, 0))) for name, array in arrays.items()}
    arrays["segments_N"] = np.repeat(np.arange(len(items) + 1), [*rows, padding])
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def parameters(cfg: VisionConfig):
    return spec.init(vision_encoder.specs(cfg), random.key(0))


@pytest.mark.parametrize("cfg", [IMAGE, VIDEO])
def test_items_of_any_size_do_not_see_one_another_nor_the_padding(cfg: VisionConfig) -> None:
    random_ = np.random.default_rng(1)
    items = [vision_encoder.patchify(random_.normal(size=(2, *hw, 3)), cfg=cfg) for hw in [(8, 8), (4, 12), (5, 7)]]
    params = parameters(cfg)
    alone = torch.cat([vision_encoder.lm_encode(params, packed(item), cfg=cfg) for item in items])
    together = vision_encoder.lm_encode(params, packed(*items, padding=8), cfg=cfg)
    assert together.shape == (alone.shape[0] + 2, cfg.d_out)
    torch.testing.assert_close(together[: alone.shape[0]], alone, rtol=1e-5, atol=1e-6)


def test_attention_looks_both_ways_within_an_item() -> None:
    params, item = parameters(IMAGE), packed(vision_encoder.patchify(np.random.rand(8, 8, 3), cfg=IMAGE))
    first = lambda x: vision_encoder.lm_encode(params, item | {"patches_NP": x}, cfg=IMAGE)[0].sum()  # noqa: E731
    reach = torch.func.grad(first)(item["patches_NP"]).abs().sum(1)
    assert (reach > 0).all()


@pytest.mark.parametrize(("cfg", "axis"), [(IMAGE, 1), (IMAGE, 2), (VIDEO, 0), (VIDEO, 1), (VIDEO, 2)])
def test_every_axis_of_the_position_matters(cfg: VisionConfig, axis: int) -> None:
    params = parameters(cfg)
    item = packed(vision_encoder.patchify(np.random.default_rng(2).normal(size=(4, 8, 8, 3)), cfg=cfg))
    moved = item | {"positions_N3": item["positions_N3"] * (1 + (torch.arange(3) == axis))}
    far = vision_encoder.lm_encode(params, moved, cfg=cfg) - vision_encoder.lm_encode(params, item, cfg=cfg)
    assert far.abs().max() > 1e-4


def test_every_parameter_takes_part() -> None:
    item = packed(vision_encoder.patchify(np.random.rand(8, 8, 3), cfg=IMAGE))
    encode = lambda p: vision_encoder.lm_encode(p, item, cfg=IMAGE).square().sum()  # noqa: E731
    grads = torch.func.grad(encode)(parameters(IMAGE))
    silent = [path for path, leaf in spec.leaves_with_paths(grads) if not leaf.abs().max() > 0]
    assert not silent


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 4), (0, 8, 3), (1, 2, 8, 8, 3)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="patchify takes"):
        vision_encoder.patchify(np.zeros(shape), cfg=IMAGE)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"heads": 5}, "d_model=24 over heads=5"), ({"heads": 12}, "1 rotary pairs"), ({"merge": 0}, "merge=0")],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vision_encoder.specs(VisionConfig(**({"d_model": 24, "layers": 1, "heads": 2, "d_out": 4} | change)))
