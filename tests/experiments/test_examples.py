"""The examples run, and do what they say."""

import inspect
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.examples import any_model, mlp, module_on_mesh, on_many_ranks, own_block, text
from ftrain import checkpoint
from tests.helpers.model_folders import TEXT, write_model
from tests.helpers.rank_processes import run_module

ROOT = Path(__file__).resolve().parents[2]


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
    loss, written = own_block.main(steps=30)
    assert loss < 1.0
    assert written.startswith("sat on the")


def test_a_module_on_a_mesh_is_that_of_one_device():
    torch.manual_seed(1)
    assert module_on_mesh.main(steps=5) < 1e-12


def losses(text):
    return {int(n): float(loss) for n, loss in re.findall(r"step (\d+) on \d+ ranks: loss ([0-9.]+)", text)}


@pytest.mark.slow
def test_a_run_on_two_ranks_is_stopped_and_goes_on_on_one(tmp_path, capsys):
    """torchrun passes SIGTERM on: both ranks save after one more step. Then the same script goes on alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    module = ["-m", "experiments.examples.on_many_ranks", str(tmp_path / "run"), "100000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = ""
    with subprocess.Popen([*command, *module], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as job:
        try:
            for line in job.stdout:
                said += line
                if line.startswith("step 5 "):
                    job.send_signal(signal.SIGTERM)
            job.wait(timeout=60)
        finally:
            job.kill()
    done = checkpoint.latest(tmp_path / "run")
    assert done is not None
    assert done == max(losses(said)) >= 5
    on_many_ranks.main(tmp_path / "run", done + 3)
    on_many_ranks.main(tmp_path / "whole", done + 3)
    went_on, whole = capsys.readouterr().out.split("step 1 on 1 ranks")
    found, expected = losses(said) | losses(went_on), losses("step 1 on 1 ranks" + whole)
    assert list(found) == list(expected)
    assert all(abs(found[n] - expected[n]) < 1e-4 for n in expected)


def folder_of(config, tmp_path):
    """transformers, and the arguments of the example: a small model's folder, a new one, and a text."""
    transformers = pytest.importorskip("transformers", minversion="5")
    write_model(config(transformers), tmp_path / "old")
    (tmp_path / "a.txt").write_text(TEXT)
    return transformers, [str(tmp_path / name) for name in ("old", "new", "a.txt")]


def gpt2(transformers):
    return transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0)


@pytest.mark.slow
def test_a_model_that_exists_is_trained_on_two_ranks_and_is_a_folder_again(tmp_path):
    transformers, arguments = folder_of(gpt2, tmp_path)
    ranks = run_module("experiments.examples.any_model", 2, tmp_path, *arguments)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    found = [loss for _, loss in sorted(losses(ranks[0].stdout).items())]
    assert len(found) == 20
    assert found[-1] < found[0]
    trained, told = transformers.AutoModelForCausalLM.from_pretrained(arguments[1], output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    old = transformers.AutoModelForCausalLM.from_pretrained(arguments[0])
    assert not torch.equal(trained.transformer.wte.weight, old.transformer.wte.weight)


@pytest.mark.parametrize("kind", ["native", "bridged"])
def test_the_folder_of_a_model_that_exists_goes_in_and_out_alone(kind, tmp_path, capsys):
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4}
    config = gpt2 if kind == "bridged" else lambda transformers: transformers.LlamaConfig(**sizes)
    transformers, arguments = folder_of(config, tmp_path)
    any_model.main(*arguments, steps=3, length=32)
    assert sorted(losses(capsys.readouterr().out)) == [1, 2, 3]
    transformers.AutoModelForCausalLM.from_pretrained(arguments[1])


def test_the_example_for_a_model_that_exists_is_short():
    lines = [line for line in inspect.getsource(any_model.main).splitlines() if line.strip()]
    assert len(lines) - 1 < 20  # but the docstring's
