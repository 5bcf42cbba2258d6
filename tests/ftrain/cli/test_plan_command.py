"""`ftrain plan --model DIR`: the layouts of the step that `ftrain train` would take, and a file that it takes."""

import json

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig

from ftrain.bridge.depth import Stack, stack_of, with_layers
from ftrain.cli.lora_flags import LoraFlags
from ftrain.cli.main import main
from ftrain.cli.plan_model import ModelStep
from ftrain.run.folder import read_metrics
from tests.helpers.chat_folders import chats, write_chat_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_chat_model(tmp_path_factory.mktemp("model"), layers=4)
    write_rows(folder / "chat.jsonl", chats(40))
    return folder


def planned(model, *words):
    return main(["plan", "--model", str(model), "--tokens", "128", "--packs", "4", "--gpus", "2", *words])


def trained(model, out, *words):
    told = ["--model", str(model), "--data", str(model / "chat.jsonl"), "--out", str(out), "--tokens", "128"]
    return main(["train", "sft", *told, "--steps", "2", "--held-out", "0", *words])


def losses(out):
    return [row["loss"] for row in read_metrics(out)]


def test_a_plan_of_a_folder_is_what_a_run_takes(model, tmp_path, capsys):
    file = tmp_path / "plan.json"
    once = ("--processes", "1", "--traced", "1", "--remat", "none", "--apply", str(file))
    assert planned(model, *once, "--budget", "10GiB") == 0
    shown = capsys.readouterr().out
    assert f"sft of {model.name}" in shown
    assert "tokens/s on all GPUs" in shown
    assert "bound by compute" in shown
    plan = json.loads(file.read_text())
    plan["layout"] |= {"replicate": 1, "shard": 2, "micro_batches": 1, "remat": "layer"}  # two packs at once
    file.write_text(json.dumps(plan))
    assert trained(model, tmp_path / "planned", "--plan", str(file)) == 0
    assert trained(model, tmp_path / "plain", "--packs", "4") == 0
    assert losses(tmp_path / "planned") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    for words in (("--replicate", "2"), ("--packs", "2"), ("--tokens", "64")):
        assert trained(model, tmp_path / "other", "--plan", str(file), *words) == 2
        assert words[0] in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_model_of_many_layers_is_known_by_a_few(model):
    lora = LoraFlags(rank=4)
    few = ModelStep(model, tokens=64, packs=2, lora=lora).workload()
    assert few.stacks == {"layers": 4}
    whole = ModelStep(model, tokens=64, packs=2, lora=lora).workload()
    object.__setattr__(whole, "stack", None)
    assert not whole.stacks
    assert vars(few.model_shape) == pytest.approx(vars(whole.model_shape))
    assert few.model_shape.layers == 4


def test_layers_that_repeat_in_turns_stay_whole_turns():
    config = Gemma3TextConfig(num_hidden_layers=14, sliding_window_pattern=6)
    stack = stack_of(config)
    assert stack == Stack(layers=14, period=6)
    assert [stack.at(turns) for turns in (1, 2)] == [8, 14]
    assert with_layers(config, 8).layer_types == config.layer_types[:8]
    assert with_layers(GPT2Config(n_layer=4), 2).n_layer == 2
    assert stack_of(LlamaConfig(num_hidden_layers=1)) is None


def test_what_cannot_be_planned_is_said(model, tmp_path, capsys):
    for words, says in (
        (("--task", "sftt"), "did you mean sft?"),
        (("--task", "kd"), "--teacher"),
        (("--size", "s"), "experiment's file"),
        (("--budget", "90GiB"), "--budget 90GiB: a h100 has 78.2 GiB"),
        (("--budget", "much"), "give bytes, 70GiB or 80%"),
        (("--lora.alpha", "3"), "give a rank"),
        (("--lora.rank", "4", "--lora.targets", "nothing"), "matches nothing"),
    ):
        assert planned(model, *words) == 2
        assert says in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "or --model DIR" in capsys.readouterr().err
    assert main(["plan", "experiments/decoder_plan.py", "--freeze", "a"]) == 2
    assert "--freeze is for --model DIR" in capsys.readouterr().err
