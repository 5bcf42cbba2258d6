"""The tokenizer of short sounds: shapes, what quantizes what, and that it fits clips."""

import pytest
import torch

from ftrain.kernels import random
from ftrain.modules import spec, vq_audio
from ftrain.modules.vq_audio import VqAudioConfig

TINY = VqAudioConfig(frames=12, mels=5, span=4, codes=8, d_code=6, depth=3)


def clips(count: int, cfg: VqAudioConfig = TINY) -> torch.Tensor:
    """Of three kinds of places and some noise."""
    kinds = random.normal(random.key(1), (3, cfg.span, cfg.mels))
    chosen = random.randint(random.key(2), (count, cfg.places), low=0, high=3)
    noise = 0.1 * random.normal(random.key(3), (count, cfg.frames, cfg.mels))
    return kinds[chosen].flatten(1, 2) + noise


@pytest.mark.parametrize("cfg", [TINY, VqAudioConfig(frames=6, mels=3, span=6, codes=4, d_code=18, depth=1)])
def test_clips_become_codes_and_codes_become_clips(cfg: VqAudioConfig) -> None:
    params = spec.init(vq_audio.specs(cfg), random.key(0))
    codes_BN = vq_audio.encode(params, clips(2, cfg), cfg=cfg)
    assert codes_BN.shape == (2, cfg.codes_per_clip)
    assert codes_BN.dtype == torch.int64
    levels = codes_BN.unflatten(1, (cfg.depth, -1)) // cfg.codes
    assert torch.equal(levels, torch.arange(cfg.depth)[None, :, None].expand_as(levels))
    assert vq_audio.decode(params, codes_BN, cfg=cfg).shape == (2, cfg.frames, cfg.mels)


def test_what_is_fitted_has_the_shapes_of_the_specs_and_keeps_clips_better_level_by_level() -> None:
    batch = clips(60)
    params = vq_audio.fit(batch, cfg=TINY, key=random.key(5))
    shapes = {name: leaf.shape for name, leaf in vq_audio.specs(TINY).items()}
    assert {name: tuple(leaf.shape) for name, leaf in params.items()} == shapes
    torch.testing.assert_close(params["components_IZ"].T @ params["components_IZ"], torch.eye(6), atol=1e-5, rtol=0)
    whole = vq_audio.encode(params, batch, cfg=TINY)
    errors = []
    for kept in range(1, TINY.depth + 1):
        books = params["codebooks_QKZ"].clone()
        books[kept:] = 0  # finer levels add nothing
        made = vq_audio.decode({**params, "codebooks_QKZ": books}, whole, cfg=TINY)
        errors.append((made - batch).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0] < 0.01 < 0.2 < batch.var().item()


def test_the_same_key_fits_the_same_and_another_another() -> None:
    one, same, other = (vq_audio.fit(clips(30), cfg=TINY, key=random.key(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["codebooks_QKZ"], other["codebooks_QKZ"])


def test_clips_do_not_see_each_other() -> None:
    batch = clips(20)
    params = vq_audio.fit(batch, cfg=TINY, key=random.key(0))
    each = torch.cat([vq_audio.encode(params, batch[i : i + 1], cfg=TINY) for i in range(3)])
    assert torch.equal(vq_audio.encode(params, batch, cfg=TINY)[:3], each)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: VqAudioConfig(frames=10, mels=4, span=4), "frames=10 are not whole places of span=4"),
        (lambda: VqAudioConfig(frames=8, mels=4, d_code=33), "d_code=33 must lie in 1 to 32"),
        (lambda: VqAudioConfig(frames=8, mels=8, depth=0), "need at least 2 codes, 1 level"),
        (lambda: vq_audio.fit(torch.zeros(2, 12, 5), cfg=TINY, key=random.key(0)), "2 clips of 3 places are too few"),
        (lambda: vq_audio.fit(torch.zeros(9, 12, 6), cfg=TINY, key=random.key(0)), r"\[B, 12, 5\], got \[9, 12, 6\]"),
        (lambda: vq_audio.decode({}, torch.zeros(2, 5, dtype=torch.int64), cfg=TINY), r"\[B, 9\], got"),
    ],
)
def test_wrong_sizes_are_named(wrong, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()
