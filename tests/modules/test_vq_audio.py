"""The tokenizer of short sounds: shapes, what quantizes what, and that it learns."""

import optree
import pytest
import torch

from ftrain.kernels import random
from ftrain.modules import codebook, spec, vq_audio
from ftrain.modules.vq_audio import VqAudioConfig

TINY = VqAudioConfig(frames=12, mels=5, span=4, width=16, blocks=1, codes=8, d_code=4, depth=2)


def clips(count: int, cfg: VqAudioConfig = TINY) -> torch.Tensor:
    return random.uniform(random.key(7), (count, cfg.frames, cfg.mels), low=-1.0)


def parameters(cfg: VqAudioConfig = TINY):
    return spec.init(vq_audio.specs(cfg), random.key(0))


@pytest.mark.parametrize("cfg", [TINY, VqAudioConfig(frames=6, mels=3, span=6, width=8, codes=4, d_code=2, depth=1)])
def test_clips_become_codes_and_codes_become_clips(cfg: VqAudioConfig) -> None:
    params = parameters(cfg)
    codes_BN = vq_audio.encode(params, clips(2, cfg), cfg=cfg)
    assert codes_BN.shape == (2, cfg.codes_per_clip)
    assert codes_BN.dtype == torch.int64
    levels = codes_BN.unflatten(1, (cfg.depth, -1)) // cfg.codes
    assert torch.equal(levels, torch.arange(cfg.depth)[None, :, None].expand_as(levels))
    assert vq_audio.decode(params, codes_BN, cfg=cfg).shape == (2, cfg.frames, cfg.mels)


def test_clips_do_not_see_each_other() -> None:
    params, batch = parameters(), clips(3)
    whole = vq_audio.encode(params, batch, cfg=TINY)
    each = torch.cat([vq_audio.encode(params, batch[i : i + 1], cfg=TINY) for i in range(3)])
    assert torch.equal(whole, each)


def test_each_level_quantizes_what_those_before_it_leave_over() -> None:
    params, batch = parameters(), clips(3)
    codes_BQP = vq_audio.encode(params, batch, cfg=TINY).unflatten(1, (TINY.depth, -1)) % TINY.codes
    left_QRZ, books_QKZ = vq_audio.latents(params, batch, cfg=TINY), params["codebooks_QKZ"]
    for level in range(TINY.depth):
        chosen_R = codes_BQP[:, level].flatten()
        assert torch.equal(codebook.nearest(left_QRZ[level], books_QKZ[level]), chosen_R)
    torch.testing.assert_close(left_QRZ[0] - books_QKZ[0][codes_BQP[:, 0].flatten()], left_QRZ[1])


def test_the_loss_reconstructs_what_decode_makes_of_encode() -> None:
    params, batch = parameters(), clips(3)
    _, terms, codes_BN = vq_audio.loss(params, batch, cfg=TINY)
    assert torch.equal(codes_BN, vq_audio.encode(params, batch, cfg=TINY))
    made = vq_audio.decode(params, codes_BN, cfg=TINY)
    torch.testing.assert_close(terms["reconstruction"].value(), (made - batch).square().mean())


def test_plain_gradient_descent_lowers_the_loss() -> None:
    params, batch = parameters(), clips(8)
    gradient = torch.func.grad_and_value(lambda p: vq_audio.loss(p, batch, cfg=TINY)[0].value())
    losses = []
    for _ in range(30):
        grads, value = gradient(params)
        params = optree.tree_map(lambda p, g: p - 0.1 * g, params, grads)
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: VqAudioConfig(frames=10, mels=4, span=4), "frames=10 are not whole places of span=4"),
        (lambda: VqAudioConfig(frames=8, mels=4, depth=0), "need at least 2 codes, 1 level"),
        (lambda: vq_audio.encode(parameters(), torch.zeros(1, 12, 6), cfg=TINY), r"\[B, 12, 5\], got \[1, 12, 6\]"),
        (lambda: vq_audio.decode(parameters(), torch.zeros(2, 5, dtype=torch.int64), cfg=TINY), r"\[B, 6\], got"),
    ],
)
def test_wrong_sizes_are_named(wrong, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()
