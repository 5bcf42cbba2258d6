"""`ftrain train sft` of a bridged vision-language folder: a document a row, a run and a folder, and again."""

import json
import shutil

import pytest

pytest.importorskip("PIL")
pytest.importorskip("transformers", minversion="5.24")

from transformers import AutoModelForImageTextToText

from ftrain.cli.main import main
from ftrain.run.folder import read_metrics
from tests.helpers.chat_folders import write_chat_model, write_rows
from tests.helpers.seeing_folders import seen_chats, write_pictures, write_qwen
from tests.helpers.tiny_wan_pipeline import write_film


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    """Pictures of two sizes that have as many patches: one shape of batches."""
    folder = tmp_path_factory.mktemp("data")
    names = write_pictures(folder, [(32, 48) if i % 2 else (48, 32) for i in range(16)])
    return write_rows(folder / "chat.jsonl", seen_chats(names))


def command(model, data, out, *more):
    """The words of a short run: 2 packs of 2 rows in a step."""
    return [
        "train", "sft", "--model", str(model), "--data", str(data), "--out", str(out), "--tokens", "192", "--native",
        "never", "--packs", "2", "--steps", "3", "--rate", "1e-2", "--warmup", "0", "--held-out", "0.1", "--every.save",
        "1", *more,
    ]  # fmt: skip


def losses(out):
    return [row["loss"] for row in read_metrics(out) if "loss" in row]


def held_out(out):
    return [row["held_out"] for row in read_metrics(out) if "held_out" in row]


@pytest.fixture(scope="module")
def whole(model, chat_file, tmp_path_factory):
    """A run of three steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(model, chat_file, out, "--every.samples", "1")) == 0
    return out


def test_a_run_learns_and_writes_a_folder_that_transformers_loads(whole):
    first, last = held_out(whole)
    assert last < first - 0.5
    assert [row["shapes"] for row in read_metrics(whole) if "loss" in row] == [1, 1, 1]
    assert AutoModelForImageTextToText.from_pretrained(whole / "model").config.model_type == "qwen2_5_vl"
    for name in ("preprocessor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (whole / "model" / name).is_file()
    answered = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in answered] == [0, 3]
    assert answered[0]["prompt"].count("<|image_pad|>") == 24


def test_it_goes_on_where_its_last_save_is_with_the_same_bits(whole, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for step in (2, 3):
        shutil.rmtree(cut / "checkpoints" / f"global_step_{step}", ignore_errors=True)
    (cut / "checkpoints" / "latest").unlink(missing_ok=True)
    assert (
        main(["train", "sft", "--config", str(whole / "config.json"), "--out", str(cut), "--every.samples", "0"]) == 0
    )
    assert losses(cut) == losses(whole)


def test_ranks_divide_the_rows(model, chat_file, whole, tmp_path):
    words = ("--shard", "2", "--steps", "1", "--every.evaluate", "0", "--every.samples", "0")
    assert main(command(model, chat_file, tmp_path / "many", *words)) == 0
    assert losses(tmp_path / "many")[0] == pytest.approx(losses(whole)[0], rel=1e-4)


def test_an_adapter_learns_from_pictures(model, chat_file, tmp_path, capsys):
    out = tmp_path / "run"
    words = ("--lora.rank", "4", "--lora.targets", "q_proj", "v_proj", "--every.samples", "0", "--steps", "2")
    assert main(command(model, chat_file, out, *words)) == 0
    first, last = held_out(out)
    assert last < first
    capsys.readouterr()
    asked = [
        "--image",
        str(chat_file.parent / "0.png"),
        "--prompt",
        "what is it?",
        "--max-new",
        "3",
        "--native",
        "never",
    ]
    adapted = ["--model", str(model), "--adapter", str(out / "adapter")]
    assert main(["generate", *adapted, *asked]) == 0
    assert "> what is it?\n" in capsys.readouterr().out
    whole = chat_file.read_text().splitlines()
    broken = chat_file.with_name("broken.jsonl")
    (chat_file.parent / "cut.png").write_bytes((chat_file.parent / "0.png").read_bytes()[:900])  # its header is whole
    broken.write_text("\n".join([*whole[1:], whole[0].replace("0.png", "cut.png")]))
    assert main(["eval", *adapted, "--data", str(broken), "--tokens", "192", "--native", "never"]) == 0
    assert "of 15 documents; 1 rows were left out" in capsys.readouterr().out


def test_prompts_may_be_about_a_picture_and_a_film(model, chat_file, tmp_path, capsys):
    pytest.importorskip("av")
    asked = ["generate", "--model", str(model), "--image", str(chat_file.parent / "0.png"), "--prompt", "which?"]
    assert main([*asked, "--video", str(write_film(tmp_path / "a.mkv")), "--max-new", "2"]) == 0
    assert "> which?\n" in capsys.readouterr().out
    assert main([*asked, "--video", str(chat_file)]) == 2
    assert "is no whole film of a known kind" in capsys.readouterr().err
    assert main(["check", "--model", str(model)]) == 2
    assert "reads media among its tokens, which this does not compare: ftrain eval" in capsys.readouterr().err


def test_rows_with_pictures_are_shown_and_counted(model, chat_file, capsys):
    assert main(["data", "show", str(chat_file), "--model", str(model), "-n", "1"]) == 0
    assert "<|vision_start|><|image_pad|>*24<|vision_end|>what is 0?" in capsys.readouterr().out
    assert main(["data", "stats", str(chat_file), "--model", str(model)]) == 0
    assert "16 of 16 rows can be trained on" in capsys.readouterr().out


def test_a_model_of_text_refuses_pictures_and_makes_no_folder(chat_file, tmp_path, capsys):
    model = write_chat_model(tmp_path / "model")
    assert main(command(model, chat_file, tmp_path / "run")) == 2
    assert "it has media (of the kind image), and the model reads text alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
