"""What the device can do, measured."""

import os

import torch

from ftrain.hardware import free_bytes, peak_flops


def test_peak_and_free_memory_are_plausible() -> None:
    cpu = torch.device("cpu")
    assert 1e8 < peak_flops(cpu) < 1e14
    assert 0 < free_bytes(cpu) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
