"""Every test runs on one thread, so that results do not depend on how work is split, and from one seed; gpu tests need
a device. Files with slow tests come first, so that no process is left alone with one at the end."""

import gc

import pytest
import torch

torch.set_num_threads(1)
# Traces make many objects and little garbage: by Python's default a tenth of all time goes into looking for it.
gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)
