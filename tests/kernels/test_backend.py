"""Which implementation of a kernel is chosen."""

import pytest
import torch

from ftrain.kernels.backend import choose_backend, device_type, lowering_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
AVAILABLE = {"cpu": "loop", "cuda": "grouped"}


def test_auto_is_the_device_s_best():
    assert choose_backend("auto", CPU, AVAILABLE) == "loop"
    assert choose_backend("auto", CUDA, AVAILABLE) == "grouped"
    assert choose_backend("auto", torch.device("meta"), AVAILABLE) == "reference"
    assert choose_backend("grouped", CPU, AVAILABLE) == "grouped"


def test_a_name_that_the_kernel_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"'fast' is not one of \['auto', 'grouped', 'loop', 'reference'\]"):
        choose_backend("fast", CPU, AVAILABLE)


def test_lowering_for_a_device_chooses_what_runs_there():
    x = torch.ones(2)
    with lowering_for("cuda"):
        assert choose_backend("auto", x.device, AVAILABLE) == "grouped"
        assert device_type(x) == device_type(x.device) == "cuda"
    assert device_type(x) == device_type(x.device) == "cpu"


def test_lowering_for_a_device_changes_nothing_off_the_cpu():
    with lowering_for("cuda"):
        assert device_type(torch.ones(2, device="meta")) == "meta"
        assert choose_backend("auto", torch.device("meta"), AVAILABLE) == "reference"


def test_under_a_higher_transform_the_reference_runs_whatever_is_lowered_for():
    def chosen(x):
        seen.append(choose_backend("auto", x.device, AVAILABLE))
        return x

    seen: list[str] = []
    with lowering_for("cuda"):
        torch.func.vmap(chosen)(torch.ones(2, 3))
    assert seen == ["reference"]
