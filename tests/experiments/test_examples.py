"""The examples run, and do what they say."""

import pytest
import torch

from experiments.examples import mlp, module_on_mesh, own_block, text


@pytest.mark.slow
def test_digits_are_told_apart():
    assert mlp.main(mlp.Options(steps=200)) > 0.9


@pytest.mark.slow
def test_a_model_of_a_text_of_ones_own_goes_on_where_it_stopped(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the cat sat on the mat and saw the rat; " * 200)
    options = text.Options((tmp_path / "a.txt",), steps=40, rows=4, length=64, out=tmp_path / "run")
    assert len(text.main(options)) == 120
    said = capsys.readouterr().out
    assert float(said.split("held out ")[1].split()[0]) < 2.0
    longer = text.Options((tmp_path / "a.txt",), steps=60, rows=4, length=64, out=tmp_path / "run")
    text.main(longer)
    said = capsys.readouterr().out
    assert "step 60" in said
    assert "step 40" not in said


def test_blocks_of_ones_own_learn_and_write():
    loss, written = own_block.main(own_block.Options(steps=30))
    assert loss < 1.0
    assert written.startswith("sat on the")


def test_a_module_on_a_mesh_is_that_of_one_device():
    torch.manual_seed(1)
    assert module_on_mesh.main(steps=5) < 1e-12
