"""The VQ tokenizer: shapes, what the quantizer's gradient is, and that it learns."""

import optree
import pytest
import torch

from kernels import random
from modules import spec, vq_image
from modules.vq_image import VqConfig

TINY = VqConfig(size=8, channels=1, widths=(8, 16), codes=16, d_code=4, groups=4)


def images(count: int, cfg: VqConfig = TINY) -> torch.Tensor:
    return random.uniform(random.key(7), (count, cfg.channels, cfg.size, cfg.size), low=-1.0)


def parameters(cfg: VqConfig = TINY):
    return spec.init(vq_image.specs(cfg), random.key(0))


@pytest.mark.parametrize(
    "cfg",
    [
        VqConfig(size=8, channels=1, widths=(8,), codes=4, groups=4),
        TINY,
        VqConfig(size=16, channels=3, widths=(8, 8, 16), codes=32, blocks=2, normalise=False),
        VqConfig(size=256, channels=3, widths=(8, 8, 8, 8, 8), codes=8),
    ],
)
def test_images_become_codes_and_codes_become_images(cfg: VqConfig) -> None:
    params = parameters(cfg)
    codes_BN = vq_image.encode(params, images(2, cfg), cfg=cfg)
    assert codes_BN.shape == (2, (cfg.size // 2 ** (len(cfg.widths) - 1)) ** 2)
    assert codes_BN.dtype == torch.int64
    assert int(codes_BN.min()) >= 0
    assert int(codes_BN.max()) < cfg.codes
    assert vq_image.decode(params, codes_BN, cfg=cfg).shape == (2, cfg.channels, cfg.size, cfg.size)


@pytest.mark.parametrize("normalise", [False, True])
def test_nearest_is_the_entry_at_the_least_distance(normalise: bool) -> None:
    rows, book = torch.randn(50, 4), torch.randn(9, 4)
    unit = torch.nn.functional.normalize if normalise else lambda x: x
    expected = torch.cdist(unit(rows).double(), unit(book).double()).argmin(1)
    assert torch.equal(vq_image.nearest(rows, book, normalise=normalise), expected)


def test_the_reconstruction_reaches_the_encoder_straight_through_and_the_codebook_not_at_all() -> None:
    def gradient(term: str) -> dict:
        return torch.func.grad(lambda p: vq_image.loss(p, images(4), cfg=TINY)[1][term].total)(parameters())

    def moved(grads: dict) -> set[str]:
        leaves = {part: grads[part]["conv_out"]["w_OIhw"] for part in ("encoder", "decoder")}
        return {part for part, leaf in (leaves | {"book": grads["codebook_KZ"]}).items() if leaf.any()}

    assert {term: moved(gradient(term)) for term in ("reconstruction", "codebook", "commitment")} == {
        "reconstruction": {"encoder", "decoder"},
        "codebook": {"book"},
        "commitment": {"encoder"},
    }


def test_loss_is_the_mean_of_single_images() -> None:
    params, batch = parameters(), images(3)
    whole = vq_image.loss(params, batch, cfg=TINY)[0].value()
    each = [vq_image.loss(params, batch[i : i + 1], cfg=TINY)[0].value() for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(each).mean(), rtol=1e-5, atol=0)


def test_the_loss_reconstructs_what_decode_makes_of_encode() -> None:
    params, batch = parameters(), images(3)
    _, terms, codes_BN = vq_image.loss(params, batch, cfg=TINY)
    assert torch.equal(codes_BN, vq_image.encode(params, batch, cfg=TINY))
    made = vq_image.decode(params, codes_BN, cfg=TINY)
    torch.testing.assert_close(terms["reconstruction"].value(), (made - batch).square().mean())


def test_plain_gradient_descent_lowers_the_loss() -> None:
    params, batch = parameters(), images(8)
    gradient = torch.func.grad_and_value(lambda p: vq_image.loss(p, batch, cfg=TINY)[0].value())
    losses = []
    for _ in range(30):
        grads, value = gradient(params)
        params = optree.tree_map(lambda p, g: p - 0.05 * g, params, grads)
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]


def test_revive_moves_exactly_the_unused_entries_onto_latent_rows() -> None:
    params, batch = parameters(), images(4)
    book_KZ, rows_RZ = params["codebook_KZ"], vq_image.latents(params, batch, cfg=TINY)
    used_K = vq_image.usage(vq_image.encode(params, batch, cfg=TINY), TINY.codes)
    assert used_K.sum() == 4 * TINY.codes_per_image
    new_KZ = vq_image.revive(book_KZ, used_K, rows_RZ, key=random.key(1))
    assert torch.equal(new_KZ[used_K >= 1], book_KZ[used_K >= 1])
    moved = new_KZ[used_K < 1]
    assert len(moved)
    assert (moved[:, None] == rows_RZ[None]).all(-1).any(1).all()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: VqConfig(size=9, widths=(8, 8)), "size=9 is not a multiple of 2"),
        (lambda: VqConfig(size=8, widths=(8, 12)), "groups=8 does not divide"),
        (
            lambda: vq_image.encode(parameters(), torch.zeros(1, 1, 8, 9), cfg=TINY),
            r"\[B, 1, 8, 8\], got \[1, 1, 8, 9\]",
        ),
        (lambda: vq_image.decode(parameters(), torch.zeros(2, 5, dtype=torch.int64), cfg=TINY), r"\[B, 16\], got"),
    ],
)
def test_wrong_sizes_are_named(wrong, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()
