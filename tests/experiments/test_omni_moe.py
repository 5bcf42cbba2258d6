"""The main job from its command line: it learns, resumes with the same numbers, and refuses what cannot be."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from experiments.omni_moe import Options, main
from ftrain import checkpoint
from ftrain.run import folder as run_folder
from ftrain.run.folder import RunFolder

SHORT = {"steps": 6, "tokenizer_steps": 10, "checkpoint_every": 3, "held_out": 2}
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_losses_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(Options(out=whole, **SHORT)) == 0
    rows = run_folder.read_metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    for name in ("config.json", "summary.json", "curves.png", "samples.png", "step.html"):
        assert (whole / name).stat().st_size > 0
    assert set(json.loads((whole / "summary.json").read_text())["held_out"]) >= {"image_to_text", "text_to_image"}

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log", ctrl_c_after(1))
        assert main(Options(out=cut, **SHORT)) == 0
    # when the row of step 1 is written, step 2 is under way
    assert checkpoint.latest(cut / "checkpoints") == len(run_folder.read_metrics(cut)) == 2
    assert "stopped by SIGINT after step 2, saved" in " ".join(capsys.readouterr().out.split())
    assert not (cut / "summary.json").exists()

    assert main(Options(out=cut, **SHORT)) == 0
    losses = [
        [{k: v for k, v in row.items() if k.startswith("loss")} for row in run_folder.read_metrics(run)]
        for run in (whole, cut)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_in_bfloat16_it_learns_answers_and_says_so(tmp_path: Path) -> None:
    assert main(Options(out=tmp_path, precision="bfloat16", **SHORT)) == 0
    rows = run_folder.read_metrics(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert run_folder.read_config(tmp_path)["resolved_precision"] == "bfloat16"
    assert "text_to_image" in json.loads((tmp_path / "summary.json").read_text())["held_out"]


def ctrl_c_after(step: int) -> Callable[[RunFolder, Mapping[str, Any]], None]:
    """What a run does with a row, and then somebody presses Ctrl-C."""
    log = RunFolder.log

    def log_and_press(files: RunFolder, row: Mapping[str, Any]) -> None:
        log(files, row)
        if row["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return log_and_press


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.omni_moe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stepz", "3"), "--stepz"),
        (("--steps", "0"), "--steps must be at least 1"),
        (
            ("--tp", "2"),
            "omni_moe.py: --tp: there is no tensor parallelism here, by design: divide parameters with shard",
        ),
        (("--steps", "1", "--pp=2"), "omni_moe.py: --pp: there is no pipeline parallelism here, by design"),
        (("--fsdp", "8"), "omni_moe.py: --fsdp: fully sharded data parallelism is called shard here"),
    ],
)
def test_a_wrong_option_is_one_clear_error(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": Path("/proc/nowhere")}, "/proc/nowhere cannot be written"),
        ({"resume": "/proc/nowhere"}, "/proc/nowhere is not the folder of a run"),
        ({"resume": "/proc/nowhere", "out": Path("/proc/other")}, "name two folders: give one"),
    ],
)
def test_folders_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(Options(**options))


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path} is in use"):
        main(Options(out=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_resumed_run_keeps_what_decides_its_numbers(tmp_path: Path) -> None:
    kept = {"size": "tiny", "steps": 7, "tokenizer_steps": 300, "seed": 0}
    run_folder.RunFolder.create(tmp_path / "run", kept).close()
    with pytest.raises(ValueError, match="has --seed 0, not 1"):
        main(Options(out=tmp_path / "run", seed=1))


def test_a_run_made_shorter_is_refused_on_the_command_line(tmp_path: Path) -> None:
    kept = {"size": "tiny", "steps": 7, "tokenizer_steps": 300, "seed": 0}
    run_folder.RunFolder.create(tmp_path / "run", kept).close()
    done = run("--out", str(tmp_path / "run"), "--steps", "6")
    assert done.returncode == 1
    assert "has --steps 7, not 6: a run that goes on may be made longer, never shorter" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_made_longer_is_the_longer_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """To the bit, where the learning rate does not depend on the length; 10 steps are not whole windows of its data."""
    options: dict[str, Any] = {"tokenizer_steps": 10, "checkpoint_every": 0, "held_out": 1, "decay": "constant"}
    assert main(Options(out=tmp_path / "run", steps=10, **options)) == 0
    assert main(Options(out=tmp_path / "run", steps=18, **options)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the run is made longer after step 10, from 10 to 18 steps: its data go on" in said
    assert main(Options(out=tmp_path / "whole", steps=18, **options)) == 0
    longer, whole = (
        [{k: v for k, v in row.items() if k.startswith(("loss", "lr", "grad"))} for row in run_folder.read_metrics(run)]
        for run in (tmp_path / "run", tmp_path / "whole")
    )
    assert longer == whole
    assert run_folder.read_config(tmp_path / "run")["steps"] == 18
