"""The command line: what it offers, and how it answers what it cannot do."""

import subprocess
import sys
from pathlib import Path

import pytest

from ftrain.cli.main import SUBCOMMANDS, main


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SUBCOMMANDS)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_explains_its_options(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    assert f"usage: ftrain {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["convart"], ["convert", "--form-hf", "x"]])
def test_a_misspelt_command_ends_with_usage(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "--help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from-hf", "a"], "convert needs either --from-hf DIR --to DIR or --from-ckpt DIR"),
        (["--from-hf", "a", "--to", "b", "--from-ckpt", "c"], "convert needs either"),
        (["--from-hf", "nowhere", "--to", "b"], "nowhere holds neither model.safetensors nor"),
        (["--from-ckpt", "nowhere"], "nowhere/model_assets/config.json is missing"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("ftrain: ")
    assert words in shown
    assert shown.count("\n") == 1


def test_it_is_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "ftrain.cli.main", "convert"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "convert needs either" in done.stderr
