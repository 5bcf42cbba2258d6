"""A step as text is the same in every process that traces it, and another for another step."""

import torch

import ftrain
from ftrain import Mean
from ftrain.step.program_text import program_lines

PARAMS, BATCH = {"w": torch.ones(4, 3)}, {"x": torch.ones(8, 4)}


def lines(scale: float = 1.0, options: str = "") -> list[str]:
    def loss(params, batch):
        return Mean.of((batch["x"] @ params["w"] * scale).sin())

    step = ftrain.jit(ftrain.value_and_grad(ftrain.accumulate(loss, micro_batches=2)), backend="aten")
    return program_lines(step.lower(PARAMS, BATCH).graph, options)


def test_the_text_of_a_step_with_a_loop_has_no_addresses():
    assert any("run_loop" in line for line in lines())
    assert not any(" at 0x" in line for line in lines())


def test_another_number_or_option_is_another_text():
    assert lines() == lines()
    assert lines() != lines(scale=2.0)
    assert lines() != lines(options="remat=all")
