"""`ftrain train` with running averages, with adapters that begin as singular directions, and with a model's state."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import ftrain
from ftrain import lora
from ftrain.cli.main import main
from ftrain.modules.spec import leaves_with_paths
from ftrain.run.folder import read_metrics
from tests.helpers.chat_folders import chats, preferences, write_chat_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_chat_model(tmp_path_factory.mktemp("model"), layers=1)
    write_rows(folder / "chat.jsonl", chats(40))
    write_rows(folder / "pairs.jsonl", preferences(30))
    return folder


def train(task, model, out, *words, data="chat.jsonl"):
    told = ["--model", str(model), "--data", str(model / data), "--out", str(out), "--tokens", "128", "--packs", "2"]
    short = ["--steps", "4", "--rate", "1e-2", "--warmup", "0", "--every.save", "2", "--every.samples", "0"]
    return main(["train", task, *told, *short, *words])


def numbers(out, name):
    return [row[name] for row in read_metrics(out) if name in row]


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_an_average_is_evaluated_and_exported_by_choice(model, tmp_path):
    both, last = tmp_path / "both", tmp_path / "last"
    common = ("--lora.rank", "2", "--ema", "0.9")
    assert train("sft", model, both, *common) == 0
    assert train("sft", model, last, *common, "--ema-use", "evaluate") == 0
    assert numbers(both, "loss") == numbers(last, "loss")
    assert numbers(both, "held_out") == numbers(last, "held_out")
    averaged, trained = adapter(both), adapter(last)
    name = next(name for name in trained if name.endswith("lora_B.weight"))
    assert 0 < averaged[name].norm() < trained[name].norm()  # it began with zeros, and lags
    assert main(["export", str(both), "--to", str(tmp_path / "again"), "--weights", "last"]) == 0
    assert torch.equal(adapter(tmp_path / "again")[name], trained[name])
    assert train("sft", model, tmp_path / "bad", "--ema", "1.5") == 2
    assert not (tmp_path / "bad").exists()


def test_pissa_begins_at_the_model_goes_on_with_the_same_bits_and_is_written_upon_the_folder(model, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ("--lora.rank", "3", "--lora.pissa", "--save-merged")
    assert train("sft", model, tmp_path / "plain", "--lora.rank", "3") == 0
    assert train("sft", model, whole, *words) == 0
    assert numbers(whole, "loss")[0] == pytest.approx(numbers(tmp_path / "plain", "loss")[0], rel=1e-5)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "global_step_4")
    assert main(["export", str(cut), "--to", str(tmp_path / "half")]) == 0
    for made in ("adapter", "model"):
        shutil.rmtree(cut / made)
    assert main(["train", "sft", "--config", str(cut / "config.json"), "--out", str(cut)]) == 0
    assert numbers(cut, "loss") == numbers(whole, "loss")
    for name, found in adapter(whole).items():
        assert torch.equal(found, adapter(cut)[name])
    ours = ftrain.hf.open(model)
    made, delta = lora.load(whole / "adapter", ours)
    assert made.targets[0].rank == 6
    merged = dict(leaves_with_paths(ftrain.hf.open(whole / "model").load()))
    for path, found in leaves_with_paths(lora.merge(ours.load(), delta, made)):
        torch.testing.assert_close(found, merged[path], rtol=1e-4, atol=1e-5)
    assert train("sft", model, tmp_path / "bad", *words, "--lora.quantize", "int8") == 2
    assert "not quantized" in capsys.readouterr().err


def test_the_reference_of_preferences_is_the_model_before_pissa_moved_it(model, tmp_path):
    out = tmp_path / "run"
    assert train("dpo", model, out, "--lora.rank", "3", "--lora.pissa", data="pairs.jsonl") == 0
    assert numbers(out, "loss")[0] == pytest.approx(0.6931, abs=1e-3)
    assert numbers(out, "loss")[-1] < 0.6931
