"""A step captured as one CUDA graph."""

import pytest
import torch

import ftrain


def step(state: dict, x: torch.Tensor) -> tuple[dict, torch.Tensor]:
    new = {"w": state["w"] * 0.5 + x, "n": state["n"] + 1}
    return new, new["w"].sum()


def test_it_needs_a_cuda_device() -> None:
    jitted = ftrain.jit(step, donate="state", backend="cudagraph")
    with pytest.raises(ValueError, match="needs arguments on a CUDA device"):
        jitted({"w": torch.ones(3), "n": torch.tensor(0)}, torch.ones(3))


@pytest.mark.gpu
def test_replays_equal_eager_steps_and_write_in_place() -> None:
    jitted = ftrain.jit(step, donate="state", backend="cudagraph")
    state = {"w": torch.ones(1024, device="cuda"), "n": torch.tensor(0, device="cuda")}
    eager = {k: v.clone() for k, v in state.items()}
    address = state["w"].data_ptr()
    for i in range(4):
        x = torch.full((1024,), float(i), device="cuda")
        state, total = jitted(state, x)
        eager, expected = step(eager, x)
        torch.testing.assert_close(total, expected, rtol=0, atol=0)
    torch.testing.assert_close(state["w"], eager["w"], rtol=0, atol=0)
    assert state["w"].data_ptr() == address
    assert int(state["n"]) == 4
