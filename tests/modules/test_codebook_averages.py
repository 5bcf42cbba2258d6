"""Quantization in levels: gradients, averages that follow what chose them, dead entries.

Legend: R rows, Z width, Q levels, K entries.
"""

import pytest
import torch

import ftrain
from ftrain.modules import codebook, codebook_averages, spec
from ftrain.sharding import Mesh, Plan

ALL_R = torch.ones(50, dtype=torch.bool)


def state(levels=3, entries=8, width=4):
    made = spec.init(codebook_averages.state_specs(levels, entries, width), ftrain.key(0))
    return {**made, "cluster_usage_QK": torch.rand(levels, entries) + 0.5}


def rows(count=50, width=4):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def test_each_level_chooses_the_nearest_to_what_is_left():
    books_QKZ, left_RZ = codebook_averages.books(state()), rows()
    found = codebook.quantize(left_RZ, books_QKZ)
    for level, book_KZ in enumerate(books_QKZ):
        torch.testing.assert_close(found.left_QRZ[level], left_RZ)
        assert torch.equal(found.codes_QR[level], torch.cdist(left_RZ.double(), book_KZ.double()).argmin(1))
        left_RZ = left_RZ - book_KZ[found.codes_QR[level]]
    torch.testing.assert_close(codebook.named(found.codes_QR, books_QKZ), rows() - left_RZ)
    assert torch.equal(codebook.quantize(rows(), books_QKZ, levels=2).codes_QR, found.codes_QR[:2])


def test_gradients_pass_straight_and_the_terms_pull_one_side_each():
    books_QKZ, rows_RZ = codebook_averages.books(state()).requires_grad_(), rows().requires_grad_()
    found = codebook.quantize(rows_RZ, books_QKZ)
    (codebook.straight_through(rows_RZ, found) * 3).sum().backward()
    assert torch.equal(rows_RZ.grad, torch.full_like(rows_RZ, 3.0))
    assert books_QKZ.grad is None
    counted_R = torch.arange(50) < 30
    rows_RZ.grad = None
    pulled, moved = codebook.commitment(found, counted_R), codebook.pull(found, counted_R)
    assert torch.equal(pulled.total, moved.total)
    wanted = (found.left_QRZ - found.entries_QRZ)[:, :30].square().mean()
    torch.testing.assert_close(pulled.value(), wanted)
    pulled.value().backward(retain_graph=True)
    difference_QRZ = (found.left_QRZ - found.entries_QRZ).detach() * counted_R[:, None]
    torch.testing.assert_close(rows_RZ.grad, 2 * difference_QRZ.sum(0) / (3 * 30 * 4))
    assert books_QKZ.grad is None
    moved.value().backward()
    book_KZ = torch.zeros(8, 4).index_add(0, found.codes_QR[1], -difference_QRZ[1])
    torch.testing.assert_close(books_QKZ.grad[1], 2 * book_KZ / (3 * 30 * 4))


def test_averages_move_to_the_mean_of_the_rows_that_chose_them():
    held, rows_RZ, counted_R = state(levels=1), rows(), torch.arange(50) < 40
    found = codebook.quantize(rows_RZ, codebook_averages.books(held))
    after = codebook_averages.moved(held, found, counted_R, decay=0.0)
    for entry in range(8):
        own_RZ = rows_RZ[:40][found.codes_QR[0, :40] == entry]
        assert after["cluster_usage_QK"][0, entry] == len(own_RZ)
        if len(own_RZ):
            torch.testing.assert_close(codebook_averages.books(after)[0, entry], own_RZ.mean(0))
    kept = codebook_averages.moved(held, found, counted_R, decay=0.9)
    mixed = 0.9 * held["embed_sum_QKZ"] + 0.1 * after["embed_sum_QKZ"]
    torch.testing.assert_close(kept["embed_sum_QKZ"], mixed)


def test_a_mesh_moves_averages_by_the_rows_of_all_ranks():
    held = state()

    def step(batch):
        found = codebook.quantize(batch["rows"], codebook_averages.books(held))
        return codebook_averages.moved(held, found, batch["counted"])

    batch = {"rows": rows(), "counted": torch.arange(50) < 31}
    many = ftrain.jit(step, plan=Plan(Mesh(shard=2, kind="virtual")), specs={})(batch)
    for one, other in zip(ftrain.tree.leaves(step(batch)), ftrain.tree.leaves(many), strict=True):
        torch.testing.assert_close(one, other)


def test_averages_of_the_same_rows_become_their_centres():
    """Lloyd's algorithm: with nothing kept, each entry in use is the mean of its rows."""
    held = codebook_averages.begun(codebook_averages.books(state(levels=1)))
    for _ in range(10):
        held = codebook_averages.moved(held, codebook.quantize(rows(), codebook_averages.books(held)), decay=0.0)
    found = codebook.quantize(rows(), codebook_averages.books(held))
    for k in found.codes_QR.unique().tolist():
        centre = rows()[found.codes_QR[0] == k].mean(0)
        torch.testing.assert_close(codebook_averages.books(held)[0, k], centre)


def test_entries_that_nothing_chooses_are_set_upon_rows():
    held = {**state(levels=2), "cluster_usage_QK": torch.tensor([[0.0] * 4 + [1.0] * 4] * 2)}
    rows_QRZ = torch.stack([rows(), rows() + 10])
    after = codebook_averages.revived(held, rows_QRZ, key=ftrain.key(1))
    books_QKZ = codebook_averages.books(after)
    assert torch.equal(books_QKZ[:, 4:], codebook_averages.books(held)[:, 4:])
    for level in range(2):
        assert all(any(torch.equal(entry, row) for row in rows_QRZ[level]) for entry in books_QKZ[level, :4])
    assert torch.equal(after["cluster_usage_QK"], torch.ones(2, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_of_other_dtypes_are_quantized_in_theirs(dtype):
    found = codebook.quantize(rows().to(dtype), codebook_averages.books(state()))
    assert found.entries_QRZ.dtype == dtype
    assert codebook.straight_through(rows().to(dtype), found).dtype == dtype
