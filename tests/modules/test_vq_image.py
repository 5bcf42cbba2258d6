"""The VQ tokenizer: shapes, what the quantizer's gradient is, and that it learns."""

import optree
import pytest
import torch

from ftrain.kernels import random
from ftrain.modules import codebook, spec, vq_image
from ftrain.modules.vq_image import VqConfig

TINY = VqConfig(size=8, channels=1, widths=(8, 16), codes=16, d_code=4, groups=4)
DEEP = VqConfig(size=8, channels=1, widths=(8, 8, 16), codes=8, d_code=4, depth=3, normalise=False, groups=4)


def images(count: int, cfg: VqConfig = TINY) -> torch.Tensor:
    return random.uniform(random.key(7), (count, cfg.channels, cfg.size, cfg.size), low=-1.0)


def parameters(cfg: VqConfig = TINY):
    return spec.init(vq_image.specs(cfg), random.key(0))


@pytest.mark.parametrize(
    "cfg",
    [
        VqConfig(size=8, channels=1, widths=(8,), codes=4, groups=4),
        TINY,
        DEEP,
        VqConfig(size=16, channels=3, widths=(8, 8, 16), codes=32, blocks=2, normalise=False),
        VqConfig(size=256, channels=3, widths=(8, 8, 8, 8, 8), codes=8),
    ],
)
def test_images_become_codes_and_codes_become_images(cfg: VqConfig) -> None:
    params = parameters(cfg)
    codes_BN = vq_image.encode(params, images(2, cfg), cfg=cfg)
    assert codes_BN.shape == (2, cfg.depth * (cfg.size // 2 ** (len(cfg.widths) - 1)) ** 2)
    assert codes_BN.dtype == torch.int64
    levels = codes_BN.unflatten(1, (cfg.depth, -1)) // cfg.codes
    assert torch.equal(levels, torch.arange(cfg.depth)[None, :, None].expand_as(levels))
    assert vq_image.decode(params, codes_BN, cfg=cfg).shape == (2, cfg.channels, cfg.size, cfg.size)


def test_nearest_is_the_entry_at_the_least_distance() -> None:
    rows, book = torch.randn(50, 4), torch.randn(9, 4)
    assert torch.equal(codebook.nearest(rows, book), torch.cdist(rows.double(), book.double()).argmin(1))


def test_each_level_quantizes_what_those_before_it_leave_over() -> None:
    params, batch = parameters(DEEP), images(3, DEEP)
    codes_BQn = vq_image.encode(params, batch, cfg=DEEP).unflatten(1, (DEEP.depth, -1)) % DEEP.codes
    left_QRZ, books_QKZ = vq_image.latents(params, batch, cfg=DEEP), params["codebooks_QKZ"]
    for level in range(DEEP.depth):
        entries_RZ = books_QKZ[level][codes_BQn[:, level].flatten()]
        assert torch.equal(codebook.nearest(left_QRZ[level], books_QKZ[level]), codes_BQn[:, level].flatten())
        if level + 1 < DEEP.depth:
            torch.testing.assert_close(left_QRZ[level] - entries_RZ, left_QRZ[level + 1])


@pytest.mark.parametrize("cfg", [TINY, DEEP])
def test_the_reconstruction_reaches_the_encoder_straight_through_and_the_codebook_not_at_all(cfg: VqConfig) -> None:
    def gradient(term: str) -> dict:
        return torch.func.grad(lambda p: vq_image.loss(p, images(4), cfg=cfg)[1][term].total)(parameters(cfg))

    def moved(grads: dict) -> set[str]:
        leaves = {part: grads[part]["conv_out"]["w_OIhw"] for part in ("encoder", "decoder")}
        return {part for part, leaf in (leaves | {"book": grads["codebooks_QKZ"]}).items() if leaf.any()}

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


@pytest.mark.parametrize("cfg", [TINY, DEEP])
def test_the_loss_reconstructs_what_decode_makes_of_encode(cfg: VqConfig) -> None:
    params, batch = parameters(cfg), images(3)
    _, terms, codes_BN = vq_image.loss(params, batch, cfg=cfg)
    assert torch.equal(codes_BN, vq_image.encode(params, batch, cfg=cfg))
    made = vq_image.decode(params, codes_BN, cfg=cfg)
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


@pytest.mark.parametrize("cfg", [TINY, DEEP])
def test_revive_moves_exactly_the_unused_entries_onto_rows_of_their_level(cfg: VqConfig) -> None:
    params, batch = parameters(cfg), images(4)
    books_QKZ, rows_QRZ = params["codebooks_QKZ"], vq_image.latents(params, batch, cfg=cfg)
    used_QK = vq_image.usage(vq_image.encode(params, batch, cfg=cfg), cfg)
    assert used_QK.sum() == 4 * cfg.codes_per_image
    new_QKZ = codebook.revive(books_QKZ, used_QK, rows_QRZ, key=random.key(1))
    assert torch.equal(new_QKZ[used_QK >= 1], books_QKZ[used_QK >= 1])
    for new_KZ, used_K, rows_RZ in zip(new_QKZ, used_QK, rows_QRZ, strict=True):
        moved = new_KZ[used_K < 1]
        assert len(moved)
        assert (moved[:, None] == rows_RZ[None]).all(-1).any(1).all()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: VqConfig(size=9, widths=(8, 8)), "size=9 is not a multiple of 2"),
        (lambda: VqConfig(size=8, widths=(8, 12)), "groups=8 does not divide"),
        (lambda: VqConfig(size=8, depth=2), "depth=2 with normalise=True"),
        (lambda: VqConfig(size=8, widths=()), "widths is empty"),
        (lambda: VqConfig(size=0), "size=0"),
        (lambda: VqConfig(size=8, groups=0), "groups=0"),
        (lambda: VqConfig(size=8, d_code=0), "d_code=0"),
        (lambda: VqConfig(size=8, commitment=-1.0), "must not be negative"),
        (lambda: vq_image.loss(parameters(), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), cfg=TINY), "are torch.uint8"),
        (lambda: vq_image.decode(parameters(), torch.full((1, 16), TINY.vocabulary), cfg=TINY), "outside the vocab"),
        (lambda: vq_image.decode(parameters(), torch.full((1, 16), -1), cfg=TINY), "outside the vocab"),
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
