"""`ftrain train sft` of a thinker on chats with recordings, and what it answers to one."""

import pytest

from ftrain.cli.main import main
from ftrain.run.folder import read_metrics
from tests.helpers.chat_folders import write_rows
from tests.helpers.hearing_folders import write_sounds, write_thinker

pytest.importorskip("soundfile")
transformers = pytest.importorskip("transformers", minversion="5.24")


@pytest.mark.slow
def test_a_run_learns_from_chats_with_recordings_and_its_folder_answers_them(tmp_path, capsys):
    model, data, out = (tmp_path / name for name in ("model", "data", "out"))
    data.mkdir()
    names = write_sounds(data, [0.5] * 6)
    asked = [[{"type": "audio", "audio": name}, {"type": "text", "text": "which?"}] for name in names]
    answer = {"role": "assistant", "content": "a sound"}
    chats = [{"messages": [{"role": "user", "content": content}, answer]} for content in asked]
    rows = write_rows(data / "chat.jsonl", chats)
    words = ["--model", str(write_thinker(model)), "--data", str(rows), "--out", str(out), "--tokens", "128"]
    assert main(["train", "sft", *words, "--packs", "2", "--steps", "2", "--rate", "3e-2", "--warmup", "0"]) == 0
    losses = [row["loss"] for row in read_metrics(out) if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    assert not any(thinker.from_pretrained(out / "model", output_loading_info=True)[1].values())
    ask = ["generate", "--model", str(out / "model"), "--prompt", "which?", "--max-new", "3"]
    assert main([*ask, "--audio", str(data / names[0])]) == 0
    assert capsys.readouterr().out.endswith("\n\n")
    assert main([*ask, "--audio", str(data / names[0]), "--plain"]) != 0
    assert "--audio: a plain text has none; ask without" in capsys.readouterr().err
