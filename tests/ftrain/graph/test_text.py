"""The graph as text."""

from pathlib import Path

import pytest
import torch

from ftrain.graph.source import SourceLine
from ftrain.graph.text import short_source, show_bytes, show_value
from ftrain.plan.jit import jit
from ftrain.trace.accumulate import accumulate
from tests.helpers.momentum_steps import momentum_state, momentum_step, stack_batch, stack_loss, stack_params


def text_of(loss, batch) -> list[str]:
    return jit(momentum_step(loss), donate="state").lower(momentum_state(stack_params()), batch).as_text().split("\n")


def test_a_line_says_what_runs_and_where_it_comes_from():
    lines = text_of(stack_loss, stack_batch())
    assert "state_params_layers_0_w: float32[16, 16]  # input, state.params.layers.0.w" in lines
    (line,) = [line for line in lines if line.startswith("mm: ")]
    assert line.startswith(
        "mm: float32[8, 16] = mm(batch_0, state_params_layers_0_w)  # forward, state.params.layers.0.w"
    )
    assert "momentum_steps.py:" in line
    assert line.endswith("512 B alive")
    assert lines[-1].startswith("return [")


def test_bodies_of_loops_are_indented():
    x, y = stack_batch()
    lines = text_of(accumulate(stack_loss, 2, stacked=True), (x.reshape(2, 4, 16), y.reshape(2, 4, 16)))
    loops = [i for i, line in enumerate(lines) if " = loop(2, " in line]
    assert len(loops) == 2
    assert all(lines[i + 1].startswith("    arg0_1: ") for i in loops)
    assert sum(line.startswith("    mm") for line in lines) == 3 + 5


def test_every_node_has_a_line():
    compiled = jit(momentum_step(stack_loss)).lower(momentum_state(stack_params()), stack_batch())
    assert len(compiled.as_text().split("\n")) == len(compiled.executed.graph.nodes)


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (3 << 40, "3 TiB")]
)
def test_bytes_are_short(count, shown):
    assert show_bytes(count) == shown


def test_values_and_sites_are_short():
    assert show_value((torch.ones(2, 3), torch.tensor(1))) == "(float32[2, 3], int64[])"
    assert short_source(SourceLine(str(Path.cwd() / "a" / "b.py"), 3, "f")) == "a/b.py:3"
    assert short_source(SourceLine("/somewhere/else/a/b.py", 3, "f")) == "a/b.py:3"
    assert short_source(None) == ""
