"""The main job from its command line: it learns, resumes with the same numbers, and refuses what cannot be."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.omni import run_folder
from experiments.omni_moe import Options, main
from ftrain import checkpoint

SHORT = {"steps": 6, "tokenizer_steps": 10, "checkpoint_every": 3, "held_out": 2}
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_run_writes_its_files_and_a_resumed_run_has_the_same_losses(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(Options(out=out, **SHORT)) == 0
    whole = run_folder.read_metrics(out)
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    assert whole[-1]["loss"] < whole[0]["loss"]
    for name in ("config.json", "summary.json", "curves.png", "samples.png", "step.html"):
        assert (out / name).stat().st_size > 0
    assert set(json.loads((out / "summary.json").read_text())["held_out"]) >= {"image_to_text", "text_to_image"}

    checkpoint.delete(out / "checkpoints", 6)
    assert main(Options(out=out, **SHORT)) == 0
    resumed = run_folder.read_metrics(out)
    losses = [{k: v for k, v in row.items() if k.startswith("loss")} for row in (*whole, *resumed)]
    assert losses[:6] == losses[6:]


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_cleanly(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--steps", "5000", "--tokenizer-steps", "2", "--out", str(out)]
    command = [sys.executable, str(ROOT / "experiments/omni_moe.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    try:
        deadline = time.monotonic() + 240
        while not (out / "metrics.jsonl").is_file() or len(run_folder.read_metrics(out)) < 2:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no step in four minutes"
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said
    done = checkpoint.latest(out / "checkpoints")
    assert done == len(run_folder.read_metrics(out))
    assert f"stopped by SIGINT after step {done}, saved" in said


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "experiments/omni_moe.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "message"), [(("--stepz", "3"), "--stepz"), (("--steps", "0"), "--steps must be at least 1")]
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
    run_folder.RunFolder.create(
        tmp_path / "run", {"size": "tiny", "steps": 5, "tokenizer_steps": 300, "seed": 0}
    ).close()
    with pytest.raises(ValueError, match="has --steps 5, not 6"):
        main(Options(out=tmp_path / "run", steps=6))
