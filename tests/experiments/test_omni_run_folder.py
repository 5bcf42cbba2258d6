"""The folder of a run: none is overwritten, what a crash leaves is whole, a resumed run has each step once."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from ftrain.run import folder as run_folder
from ftrain.run.folder import RunFolder


def test_a_run_leaves_its_config_its_metrics_and_its_summary(tmp_path):
    path = tmp_path / "runs" / "new"
    with RunFolder.create(path, {"seed": 3, "words": "null 零"}) as folder:
        for step in (1, 2, 3):
            folder.log({"step": step, "loss": 1 / step})
            assert run_folder.read_metrics(path)[-1]["step"] == step
        folder.summarise({"held_out": {"image_to_text": 0.97}})
    assert run_folder.read_config(path) == {"seed": 3, "words": "null 零"}
    assert run_folder.read_metrics(path) == [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    assert json.loads((path / "summary.json").read_text()) == {"held_out": {"image_to_text": 0.97}}
    assert sorted(file.name for file in path.iterdir()) == [".writer", "config.json", "metrics.jsonl", "summary.json"]


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=rf"{tmp_path} is in use: it holds thesis.tex"):
        RunFolder.create(tmp_path, {})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("path", ["file/run", "file"])
def test_an_unwritable_folder_is_named(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"{tmp_path / path} cannot be written"):
        RunFolder.create(tmp_path / path, {})


def test_resuming_drops_the_steps_that_come_again_and_a_torn_line(tmp_path):
    path = tmp_path / "run"
    with RunFolder.create(path, {}) as folder:
        for step in range(1, 6):
            folder.log({"step": step})
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with RunFolder.resume(path, step=3) as folder:
        folder.log({"step": 4, "again": True})
    assert run_folder.read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]


def test_resuming_elsewhere_or_over_broken_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} is not the folder of a run"):
        RunFolder.resume(tmp_path, step=3)
    with pytest.raises(ValueError, match=rf"{tmp_path} is not the folder of a run"):
        run_folder.read_config(tmp_path)
    path = tmp_path / "run"
    RunFolder.create(path, {}).close()
    (path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2.*'rubbish'"):
        RunFolder.resume(path, step=3)
    assert "rubbish" in (path / "metrics.jsonl").read_text()


def test_metrics_need_a_step(tmp_path):
    with RunFolder.create(tmp_path / "run", {}) as folder, pytest.raises(ValueError, match="int `step`"):
        folder.log({"loss": 1.0})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "config.json"
    run_folder.write_json(file, {"old": True})
    with pytest.raises(TypeError):
        run_folder.write_json(file, {"not json": object()})
    assert json.loads(file.read_text()) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_default_paths_never_meet_and_the_latest_is_found(tmp_path):
    noon = datetime(2026, 1, 2, 12, 0, 0)
    assert run_folder.latest("omni_moe", root=tmp_path) is None
    paths: list[Path] = []
    for _ in range(2):
        paths.append(run_folder.default_path("omni_moe", root=tmp_path, now=noon))
        RunFolder.create(paths[-1], {}).close()
    assert [path.name for path in paths] == ["20260102-120000", "20260102-120000-2"]
    assert run_folder.latest("omni_moe", root=tmp_path) == paths[1]
