"""Rotation against complex numbers, and the ways to deal frequencies out to axes."""

import dataclasses
import math

import pytest
import torch

from ftrain.kernels.rope import Llama3Scaling, rope, rope_table


def complex_rotation(x, angle_TF, layout):
    """Each pair of dims is one complex number, turned by its angle."""
    F = angle_TF.shape[1]
    pairs = x[..., : 2 * F].double()
    first, second = (pairs[..., :F], pairs[..., F:]) if layout == "half" else (pairs[..., 0::2], pairs[..., 1::2])
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle_TF), angle_TF)[:, None]
    y = torch.cat([turned.real, turned.imag], -1) if layout == "half" else torch.view_as_real(turned).flatten(-2)
    return torch.cat([y, x[..., 2 * F :].double()], -1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize(("heads", "head_dim", "rotated"), [(3, 8, 8), (2, 10, 6), (2, 7, 4), (1, 2, 2), (0, 4, 4)])
def test_is_a_complex_rotation(heads, head_dim, rotated, dtype, tolerance, layout, backend):
    x = torch.randn(9, heads, head_dim).to(dtype)
    positions = torch.randint(0, 1000, (9,))
    cos, sin = rope_table(positions, head_dim=rotated, base=500.0, dtype=torch.float64)
    angle = positions[:, None] * 500.0 ** (-torch.arange(rotated // 2, dtype=torch.float64) / (rotated // 2))
    found = rope(x, cos, sin, layout=layout, backend=backend)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), complex_rotation(x, angle, layout), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_distance_alone(layout):
    q, k = torch.randn(1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 16, dtype=torch.float64)

    def score(a, b):
        tables = (rope_table(torch.tensor([p]), head_dim=16, dtype=torch.float64) for p in (a, b))
        q_turned, k_turned = (rope(x, *table, layout=layout) for x, table in zip((q, k), tables, strict=True))
        return (q_turned * k_turned).sum()

    torch.testing.assert_close(score(3, 10), score(1003, 1010))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_pieces_of_a_strided_projection(layout, dtype):
    qkv = torch.randn(3000, 12, 64).to(dtype)
    cos, sin = rope_table(torch.arange(3000), head_dim=64)
    found = rope(qkv[:, 2:6], cos, sin, layout=layout)
    expected = rope(qkv[:, 2:6].contiguous(), cos, sin, layout=layout, backend="reference")
    torch.testing.assert_close(found, expected)


def axes_of(cos, sin, positions):
    """For each frequency, the axis whose position alone sets the angle."""
    A = len(positions)
    angle = torch.atan2(sin, cos)
    return [next(a for a in range(A) if angle[a].abs()[f] > 1e-9) for f in range(angle.shape[1])]


ONE_HOT = torch.eye(3, dtype=torch.int64)  # token t is at 1 on axis t and 0 on the others


def test_chunked_sections_share_one_ladder():
    """Qwen2-VL: mrope_section [2, 3, 3] of 8 frequencies."""
    cos, sin = rope_table(ONE_HOT, head_dim=16, base=100.0, sections=(2, 3, 3), dtype=torch.float64)
    assert axes_of(cos, sin, ONE_HOT) == [0, 0, 1, 1, 1, 2, 2, 2]
    angle = torch.atan2(sin, cos).sum(0)
    torch.testing.assert_close(angle, 100.0 ** (-torch.arange(8, dtype=torch.float64) / 8))


def test_interleaved_sections_share_one_ladder():
    """Qwen3-VL: of mrope_section [4, 2, 2] the height owns slots 1, 4 and the width 2, 5."""
    cos, sin = rope_table(ONE_HOT, head_dim=16, base=100.0, sections=(4, 2, 2), interleaved=True, dtype=torch.float64)
    assert axes_of(cos, sin, ONE_HOT) == [0, 1, 2, 0, 1, 2, 0, 0]
    angle = torch.atan2(sin, cos).sum(0)
    torch.testing.assert_close(angle, 100.0 ** (-torch.arange(8, dtype=torch.float64) / 8))


@pytest.mark.parametrize("sections", [(24, 20, 20), (4, 2, 2), (1, 1, 1)])
def test_interleaved_gives_each_axis_its_frequencies(sections):
    cos, sin = rope_table(ONE_HOT, head_dim=2 * sum(sections), sections=sections, interleaved=True)
    owners = axes_of(cos.double(), sin.double(), ONE_HOT)
    assert tuple(owners.count(a) for a in range(3)) == sections


def test_a_ladder_for_each_axis():
    """Wan: 22, 21 and 21 frequencies of a head of 128, each ladder begins at 1."""
    cos, sin = rope_table(ONE_HOT, head_dim=128, sections=(22, 21, 21), per_axis_ladder=True, dtype=torch.float64)
    assert axes_of(cos, sin, ONE_HOT) == [0] * 22 + [1] * 21 + [2] * 21
    expected = torch.cat([10000.0 ** (-torch.arange(n, dtype=torch.float64) / n) for n in (22, 21, 21)])
    torch.testing.assert_close(torch.atan2(sin, cos).sum(0), expected)


def test_equal_positions_on_all_axes_are_text():
    positions = torch.arange(50)
    expected = rope_table(positions, head_dim=16)
    for interleaved in (False, True):
        found = rope_table(positions.expand(3, 50), head_dim=16, sections=(4, 2, 2), interleaved=interleaved)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_positions_may_be_fractions():
    cos, _ = rope_table(torch.tensor([0.25, 8.2]), head_dim=2, dtype=torch.float64)
    torch.testing.assert_close(cos[:, 0], torch.tensor([0.25, 8.2]).double().cos())


def test_far_positions_keep_their_angles():
    """Angles are worked out in float64: in float32 they would be off by 0.03 here."""
    position = 1_000_001
    cos, _ = rope_table(torch.tensor([position]), head_dim=8)
    angle = position * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    torch.testing.assert_close(cos[0], angle.cos().float(), rtol=0, atol=1e-6)


SCALING = Llama3Scaling(8.0, low_turns=1.0, high_turns=4.0, original_length=1000)


@pytest.mark.parametrize("sections", [None, (5, 7)])
def test_scaled_frequencies_turn_slower_the_longer_they_are(sections):
    """Those of many turns in 1000 tokens stay, those of less than one are an eighth, and the order is kept."""
    positions = torch.ones(1) if sections is None else torch.ones(2, 1)
    cos, _ = rope_table(positions, head_dim=24, base=1e5, sections=sections, scaling=SCALING, dtype=torch.float64)
    plain = 1e5 ** (-torch.arange(12, dtype=torch.float64) / 12)
    scaled, turns = cos[0].acos(), plain * 1000 / (2 * math.pi)
    ratio = scaled / plain
    torch.testing.assert_close(ratio[turns > 4], torch.ones_like(ratio[turns > 4]))
    torch.testing.assert_close(ratio[turns < 1], torch.full_like(ratio[turns < 1], 1 / 8), rtol=1e-4, atol=0)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between)
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (scaled.diff() < 0).all()


@pytest.mark.parametrize("change", [{"factor": 0.5}, {"low_turns": 4.0}, {"original_length": 0}])
def test_a_scaling_without_sense_is_refused(change):
    with pytest.raises(ValueError, match="factor must be at least 1, original_length positive"):
        dataclasses.replace(SCALING, **change)


X = torch.ones(3, 2, 4)
TABLE = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope_table(torch.arange(3), head_dim=5), "head_dim=5"),
        (lambda: rope_table(torch.ones(2, 2, 2), head_dim=4), r"\[2, 2, 2\]"),
        (lambda: rope_table(ONE_HOT, head_dim=4), "3 axes of positions need sections"),
        (lambda: rope_table(ONE_HOT, head_dim=8, sections=(2, 1, 2)), "4 in all .* sum to 5"),
        (lambda: rope_table(ONE_HOT, head_dim=8, sections=(2, 2)), "each of 3 axes"),
        (lambda: rope_table(ONE_HOT, head_dim=8, sections=(0, 2, 2), interleaved=True), "do not fit in 4"),
        (
            lambda: rope_table(ONE_HOT, head_dim=6, sections=(1, 1, 1), interleaved=True, per_axis_ladder=True),
            "take one of",
        ),
        (lambda: rope(X, TABLE, TABLE, layout="neox"), "'neox' is not one of"),
        (lambda: rope(X[0], TABLE, TABLE), r"\[2, 4\]"),
        (lambda: rope(X, TABLE[:2], TABLE[:2]), "with T of x"),
        (lambda: rope(X, torch.ones(3, 3), torch.ones(3, 3)), "3 frequencies turn twice as many dims"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_table_that_wants_a_gradient_is_an_error():
    table = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="reference"):
        rope(X, table, table).sum().backward()
    (gradient,) = torch.autograd.grad(rope(X, table, table, backend="reference").sum(), table)
    assert gradient.shape == (3, 2)
