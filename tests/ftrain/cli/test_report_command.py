"""`ftrain report RUN`: what a run trained, how its numbers went, what it left out, where it ended."""

import pytest

from ftrain.cli.main import main
from ftrain.run.folder import read_metrics
from ftrain.run.record import read_record
from ftrain.run.samples import write
from tests.helpers.chat_folders import chats, write_chat_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_chat_model(tmp_path_factory.mktemp("model"))
    write_rows(folder / "chat.jsonl", [*chats(40), {"messages": [{"role": "user", "content": None}]}])
    return folder


def train(model, out, *words):
    told = ["--model", str(model), "--data", str(model / "chat.jsonl"), "--out", str(out), "--tokens", "128"]
    short = ["--packs", "1", "--steps", "4", "--rejected", "0.5", "--every.evaluate", "2", "--every.save", "2"]
    return main(["train", "sft", *told, *short, *words])


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(model, out, "--lora.rank", "2") == 0
    return out


def test_a_run_is_told_on_the_terminal_and_as_a_page(finished, tmp_path, capsys):
    write(finished, 4, [("asked\u2028of", "said\x85so")])
    assert main(["report", str(finished), "--html", str(tmp_path / "run.html")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    losses = [row["loss"] for row in read_metrics(finished) if "loss" in row]
    for words in (
        "trained sft of llama (native): 1,856 numbers of an adapter of 14 parameters",
        "41 rows of the format",
        "ended finished after step 4",
        f"loss {losses[0]:.4f} at first, {sum(losses) / 4:.4f} over the last 4 of 4 steps",
        "held-out loss",
        "tokens/s in the middle",
        "1 x ",
        "of a rank at the peak of a step",
        "checkpoints 2, 4",
        "folders adapter",
    ):
        assert words in shown
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "asked\u2028of" in page
    assert "said\x85so" in page
    assert page.count("<polyline") == 4  # the loss, the held-out one, the norm, the speed
    assert "&quot;rank&quot;: 2" in page


def test_a_run_that_was_killed_or_failed_says_so(finished, model, tmp_path, capsys):
    (finished / "summary.json").rename(tmp_path / "summary.json")
    assert dict(read_record(finished).facts())["ended"] == "it goes on, or was killed: its last step is 4"
    (tmp_path / "summary.json").rename(finished / "summary.json")
    assert train(model, tmp_path / "failed", "--rate", "1e30", "--every.give-up", "1") == 2
    ended = dict(read_record(tmp_path / "failed").facts())["ended"]
    assert "gradients that are not finite" in ended
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_a_layout_that_cannot_be_is_refused_before_the_folder_exists(model, tmp_path, capsys):
    assert train(model, tmp_path / "run", "--sequence", "3") == 2
    assert "--tokens 128 of a pack do not divide among --sequence 3 ranks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
