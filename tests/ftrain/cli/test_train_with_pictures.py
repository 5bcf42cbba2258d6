"""`ftrain train sft` of a vision-language folder on chats with pictures: a run and a folder, and again where it stopped."""

import shutil

import pytest

transformers = pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("PIL")

from ftrain.cli.main import main
from ftrain.run.folder import read_metrics
from tests.helpers.chat_folders import write_chat_model, write_rows
from tests.helpers.seeing_folders import seen_chats, write_pictures, write_qwen


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    """Pictures of two sizes that have as many patches: one shape of batches."""
    folder = tmp_path_factory.mktemp("data")
    names = write_pictures(folder, [(32, 48) if i % 2 else (48, 32) for i in range(16)])
    return write_rows(folder / "chat.jsonl", seen_chats(names))


def command(model, data, out, *more):
    """The words of a short run: 2 packs of 2 rows in a step."""
    return [
        "train", "sft", "--model", str(model), "--data", str(data), "--out", str(out), "--tokens", "192", "--packs", "2",
        "--steps", "3", "--rate", "1e-2", "--warmup", "0", "--held-out", "0.1", "--every.save", "1", *more,
    ]  # fmt: skip


def losses(out):
    return [row["loss"] for row in read_metrics(out) if "loss" in row]


def held_out(out):
    return [row["held_out"] for row in read_metrics(out) if "held_out" in row]


@pytest.mark.filterwarnings("ignore:the step is traced again")
def test_a_run_learns_goes_on_with_the_same_bits_and_writes_a_folder_that_transformers_loads(
    model, chat_file, tmp_path, capsys
):
    whole, cut, many = tmp_path / "whole", tmp_path / "cut", tmp_path / "many"
    assert main(command(model, chat_file, whole)) == 0
    assert "each document is a row: 1 shape of packs: 2 x 96, 24 of them of media" in capsys.readouterr().out
    first, last = held_out(whole)
    assert last < first - 0.5
    assert [row["shapes"] for row in read_metrics(whole) if "loss" in row] == [1, 1, 1]
    shutil.copytree(whole, cut)
    for step in (2, 3):
        shutil.rmtree(cut / "checkpoints" / f"global_step_{step}", ignore_errors=True)
    (cut / "checkpoints" / "latest").unlink(missing_ok=True)
    assert main(["train", "sft", "--config", str(whole / "config.json"), "--out", str(cut)]) == 0
    assert losses(cut) == losses(whole)

    assert main(command(model, chat_file, many, "--shard", "2")) == 0
    assert losses(many) == pytest.approx(losses(whole), rel=1e-4)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(whole / "model")
    assert loaded.config.model_type == "qwen2_5_vl"
    for name in ("preprocessor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (whole / "model" / name).is_file()


def test_an_adapter_learns_from_pictures(model, chat_file, tmp_path):
    assert (
        main(command(model, chat_file, tmp_path / "run", "--lora.rank", "4", "--lora.targets", "q_proj", "v_proj")) == 0
    )
    first, last = held_out(tmp_path / "run")
    assert last < first
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_a_model_of_text_refuses_pictures_and_makes_no_folder(chat_file, tmp_path, capsys):
    model = write_chat_model(tmp_path / "model")
    assert main(command(model, chat_file, tmp_path / "run")) == 2
    assert "it has media (of the kind image), and the model reads text alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
