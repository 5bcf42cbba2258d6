"""The main job from its command line: it learns, resumes with the same numbers, and refuses what cannot be."""

import json
import runpy
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

SHORT: dict[str, Any] = {"size": "smoke", "tokenizer_steps": 5, "held_out": 1}
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_run_that_is_interrupted_and_one_made_longer_are_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """To the bit; the rate is one that does not depend on the length, and 10 steps are not whole windows of data."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {**SHORT, "decay": "constant"}
    assert main(Options(out=whole, steps=18, checkpoint_every=0, **options)) == 0
    rows = run_folder.read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert rows[-1]["loss"] < rows[0]["loss"]
    for name in ("config.json", "summary.json", "curves.png", "samples.png", "step.html"):
        assert (whole / name).stat().st_size > 0
    assert set(json.loads((whole / "summary.json").read_text())["held_out"]) >= {"image_to_text", "text_to_image"}

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log", ctrl_c_after(1))
        assert main(Options(out=cut, steps=10, checkpoint_every=3, **options)) == 0
    # when the row of step 1 is written, step 2 is under way
    assert checkpoint.latest(cut / "checkpoints") == len(run_folder.read_metrics(cut)) == 2
    assert "stopped by SIGINT after step 2, saved" in " ".join(capsys.readouterr().out.split())
    assert not (cut / "summary.json").exists()

    assert main(Options(out=cut, steps=10, checkpoint_every=3, **options)) == 0
    assert numbers(cut) == numbers(whole)[:10]

    assert main(Options(out=cut, steps=18, checkpoint_every=0, **options)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the run is made longer after step 10, from 10 to 18 steps: its data go on" in said
    assert numbers(cut) == numbers(whole)
    assert run_folder.read_config(cut)["steps"] == 18


def numbers(run: Path) -> list[dict[str, float]]:
    """What decides whether two runs are one, of each step."""
    kept = ("loss", "lr", "grad")
    return [{k: v for k, v in row.items() if k.startswith(kept)} for row in run_folder.read_metrics(run)]


@pytest.mark.slow
def test_in_bfloat16_it_learns_answers_and_says_so(tmp_path: Path) -> None:
    assert main(Options(out=tmp_path, precision="bfloat16", steps=6, **SHORT)) == 0
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


def test_a_wrong_option_is_one_clear_error() -> None:
    command = [sys.executable, "-m", "experiments.omni_moe", "--steps", "1", "--pp=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("omni_moe.py: --pp: there is no pipeline parallelism here, by design")
    assert done.stderr.count("\n") == 1


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What the program says as it ends; what is no exit is a traceback and raises here."""
    file = str(ROOT / "experiments" / "omni_moe.py")
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(file, run_name="__main__")
    assert ended.value.code
    return str(ended.value.code) + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stepz", "3"), "--stepz"),
        (("--steps", "0"), "--steps must be at least 1"),
        (
            ("--tp", "2"),
            "omni_moe.py: --tp: there is no tensor parallelism here, by design: divide parameters with shard",
        ),
        (("--fsdp", "8"), "omni_moe.py: --fsdp: fully sharded data parallelism is called shard here"),
    ],
)
def test_the_message_names_the_option(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert message in refusal(monkeypatch, capsys, *arguments)


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


def test_a_run_made_shorter_is_refused_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kept = {"size": "tiny", "steps": 7, "tokenizer_steps": 300, "seed": 0}
    run_folder.RunFolder.create(tmp_path / "run", kept).close()
    said = refusal(monkeypatch, capsys, "--out", str(tmp_path / "run"), "--steps", "6")
    assert "has --steps 7, not 6: a run that goes on may be made longer, never shorter" in said
