"""What the device can do, measured."""

import os

import pytest
import torch

from ftrain.analysis.hardware import copy_bandwidth, free_bytes, peak_flops


def test_peak_and_free_memory_are_plausible() -> None:
    cpu = torch.device("cpu")
    assert 1e8 < peak_flops(cpu) < 1e14
    assert 0 < free_bytes(cpu) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_peak_is_that_of_products_of_random_numbers(monkeypatch):
    """Of ones a GPU is faster than of what is trained on."""
    factors = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: factors.append((a, b)) or mm(a, b, out=out))
    assert peak_flops(torch.device("cpu")) > 0
    assert all(x.std() > 0.9 for pair in factors[:1] for x in pair)


def test_copies_are_as_fast_as_memory():
    assert 1e8 < copy_bandwidth(torch.device("cpu")) < 1e13


@pytest.mark.gpu
def test_measuring_a_card_takes_little_of_it():
    """A state may lie there already."""
    cuda = torch.device("cuda", 0)
    for measure in (peak_flops, copy_bandwidth, lambda device: peak_flops(device, torch.bfloat16)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measure(cuda)
        assert torch.cuda.max_memory_allocated() - before <= 560 << 20


@pytest.mark.gpu
def test_what_the_allocator_keeps_unused_is_free():
    cuda = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before = free_bytes(cuda)
    x = torch.empty(1 << 30, dtype=torch.uint8, device=cuda)
    held = free_bytes(cuda)
    del x
    assert before - held >= 1 << 30
    assert free_bytes(cuda) >= held + (1 << 30)
