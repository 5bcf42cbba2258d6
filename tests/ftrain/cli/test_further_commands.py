"""The commands around a model's folder: what they print and write, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import ftrain
from ftrain.cli.main import main
from tests.helpers.chat_folders import chats, write_chat_model, write_rows

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """An adapter that was trained for a few steps."""
    folder = tmp_path_factory.mktemp("run")
    data = write_rows(folder / "chat.jsonl", chats(30))
    words = [
        "train", "sft", "--model", model, "--data", data, "--out", folder / "run", "--lora.rank", "4", "--steps", "3",
        "--tokens", "128", "--packs", "2", "--rate", "1e-2", "--held-out", "0",
    ]  # fmt: skip
    assert main(list(map(str, words))) == 0
    return folder / "run" / "adapter"


def test_a_merged_folder_answers_as_the_model_with_its_adapter(model, adapter, tmp_path, capsys):
    assert main(["merge", "--model", str(model), "--adapter", str(adapter), "--to", str(tmp_path / "merged")]) == 0
    asked = ["--prompt", "say 3", "say 12", "--max-new", "6"]
    assert main(["generate", "--model", str(model), "--adapter", str(adapter), *asked]) == 0
    with_adapter = capsys.readouterr().out.split("\n", 1)[1]
    assert main(["generate", "--model", str(tmp_path / "merged"), *asked]) == 0
    assert capsys.readouterr().out == with_adapter
    assert main(["merge", "--model", str(model), "--adapter", str(adapter), "--to", str(tmp_path / "merged")]) == 2


def test_the_loss_on_a_file_is_that_of_the_model_over_its_labels(model, tmp_path, capsys):
    from ftrain.data.chat_template import load_tokenizer
    from ftrain.data.encoding import ChatEncoder
    from ftrain.data.samples import open_samples

    data = write_rows(tmp_path / "chat.jsonl", chats(12))
    assert main(["eval", "--model", str(model), "--data", str(data), "--tokens", "128"]) == 0
    shown = capsys.readouterr().out
    samples, encoder, opened = open_samples(data), ChatEncoder(load_tokenizer(model)), ftrain.hf.open(model)
    params, means = opened.load(), []
    for index in range(len(samples)):
        document = encoder.encode(samples[index]).document()
        batch = {"tokens": torch.from_numpy(document.tokens), "labels": torch.from_numpy(document.labels)}
        means.append(opened.loss(params, batch))
    assert f"loss {ftrain.Mean.pool(means).item():.4f}" in shown
    assert "12 documents; 0 rows were left out" in shown


def test_parameters_are_counted_and_found_by_globs(model, capsys):
    assert main(["params", "--model", str(model)]) == 0
    counted = sum(leaf.numel() for leaf in ftrain.tree.leaves(ftrain.hf.open(model).load()))
    assert f"{counted:,} parameters" in capsys.readouterr().out
    assert main(["params", "--model", str(model), "--match", "layers.*.attention.w_q_*"]) == 0
    assert capsys.readouterr().out.count("w_q_DHK") == 2
    assert main(["params", "--model", str(model), "--match", "layers.*.atention.*"]) == 2
    assert "matches nothing; nearest: 'layers.1.attention" in capsys.readouterr().err


def test_a_folder_is_checked_against_its_plain_module(model, capsys):
    assert main(["check", "--model", str(model), "--shard", "2"]) == 0
    assert "equal" in capsys.readouterr().out
    assert main(["check", "--model", str(model), "--tolerance", "1e-30"]) == 1
    assert "NOT equal" in capsys.readouterr().out


def test_the_doctor_says_what_there_is(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"torch {torch.__version__}" in shown
    assert "CPU cores" in shown


def test_what_the_doctor_knows_are_the_extras_of_the_distribution():
    import re
    import tomllib

    from ftrain.cli.doctor import BASE, EXTRAS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = lambda listed: [re.split(r"[><=\[ ]", entry)[0] for entry in listed]  # noqa: E731
    assert tuple(names(project["dependencies"])) == BASE
    for extra, known in EXTRAS.items():
        assert tuple(names(project["optional-dependencies"][extra])) == known


TRAIN = ["train", "sft", "--model", "a folder", "--data", "chat.jsonl", "--out", "runs/x"]


def test_a_script_for_slurm_is_the_tested_one_with_the_command_in_it(tmp_path):
    file = tmp_path / "job.sh"
    assert main(["launch", "slurm", "--out", str(file), "--nodes", "4", "--", *TRAIN]) == 0
    made, tested = file.read_text(), (ROOT / "experiments" / "launch" / "slurm.sh").read_text()
    assert "#SBATCH --nodes=4" in made
    assert "-m ftrain train sft --model 'a folder' --data chat.jsonl --out runs/x" in made
    loop = [line for line in tested[tested.index("resumable=75") :].splitlines() if "PYTHONPATH" not in line]
    ours = made[made.index("resumable=75") :].splitlines()
    different = [(a, b) for a, b in zip(loop, ours, strict=True) if a != b]
    assert len(different) == 1
    assert "|| code=$?" in different[0][1]


def test_files_for_other_schedulers_are_yaml_with_the_command_in_them(tmp_path):
    kube, sky = tmp_path / "job.yaml", tmp_path / "sky.yaml"
    assert main(["launch", "kubeflow", "--out", str(kube), "--image", "me/ftrain", "--nodes", "3", "--", *TRAIN]) == 0
    job = yaml.safe_load(kube.read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 3
    assert worker["template"]["spec"]["containers"][0]["command"] == ["torchrun", "-m", "ftrain", *TRAIN]
    assert main(["launch", "skypilot", "--out", str(sky), "--", *TRAIN]) == 0
    assert "-m ftrain train sft --model 'a folder'" in yaml.safe_load(sky.read_text())["run"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--", "rm", "-rf"], "say what ftrain is to do there"),
        (["--", "train", "sft"], "give the run an --out"),
        (["--nodes", "0", "--", *TRAIN], "--nodes 0 must be at least 1"),
    ],
)
def test_what_no_scheduler_should_start_is_refused(tmp_path, capsys, words, says):
    assert main(["launch", "slurm", "--out", str(tmp_path / "job.sh"), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "job.sh").exists()


def test_the_options_of_a_run_are_a_file_that_it_takes_back(model, adapter):
    config = json.loads((adapter.parent / "config.json").read_text())
    assert (config["lora"]["rank"], config["steps"], config["rate"]) == (4, 3, 0.01)
