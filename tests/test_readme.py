"""The README's examples run as they stand, its figures are those of the benches, and pages name files that exist."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.rank_processes import run_script

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_examples_run_one_after_the_other(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 7
    names: dict = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    losses = [float(line) for line in capsys.readouterr().out.splitlines()[:3]]
    assert losses[-1] < losses[0]
    assert names["compiled"].memory().peak > 0
    assert Path("step.html").stat().st_size > 0
    assert names["checkpoints"].steps() == [100]


@pytest.mark.slow
def test_the_script_for_many_ranks_is_short_and_goes_on_on_another_number_of_ranks(
    tmp_path, monkeypatch, capsys
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (script,) = [block for block in blocks if "ftrain.run.session" in block]
    assert len(script.splitlines()) <= 20
    file = tmp_path / "script.py"
    file.write_text(
        "import torch\ntorch.set_num_threads(1)\ntorch.manual_seed(0)\n"
        + blocks[0]
        + script.replace("(done, 6)", "(done, 2)")
    )
    ranks = run_script(file, 2, cwd=tmp_path, seconds=200)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    file.write_text(file.read_text().replace("(done, 2)", "(done, 4)"))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(file), run_name="__main__")
    said = re.findall(r"step (\d+): ([0-9.]+)", ranks[0].stdout + capsys.readouterr().out)
    assert [int(n) for n, _ in said] == [1, 2, 3, 4]
    assert float(said[-1][1]) < float(said[0][1])


ROOT = README.parent
NUMBER = re.compile(r"(?<![\w.-])(\d+(?:\.(\d+))?)(%?)")


def numbers_in(found: Any) -> Iterator[float]:
    """All numbers of a JSON value, also those within its texts."""
    if isinstance(found, dict | list):
        for part in [*found, *found.values()] if isinstance(found, dict) else found:
            yield from numbers_in(part)
    elif isinstance(found, str):
        yield from (float(n) for n, _, _ in NUMBER.findall(found))
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield float(found)


def figures() -> list[list[str]]:
    """The rows of the table of figures: date, machine, figure, ours, beside, file."""
    section = README.read_text(encoding="utf-8").partition("\n## Figures\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


@pytest.mark.parametrize("row", figures(), ids=lambda row: row[2])
def test_each_number_of_a_figure_is_in_the_file_that_its_row_names(row) -> None:
    date, _, *told, file = row
    results = json.loads((ROOT / "experiments" / "bench" / "results" / file.strip("`")).read_text())
    assert results["date"] == date
    there = list(numbers_in({name: results[name] for name in ("rows", "totals") if name in results} or results))
    for shown, decimals, percent in NUMBER.findall(" ".join(told)):
        scale, close = 100 if percent else 1, 0.5 * 10 ** -len(decimals) + 1e-9
        assert any(abs(scale * value - float(shown)) <= close for value in there), f"{shown}{percent} is not in {file}"


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "AGENTS.md"])
def test_the_files_that_a_page_names_exist(page) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^):]+)\)", text)
    assert [path for path in linked if not (ROOT / path).exists()] == []
    rooms = ("kernels", "sharding", "modules", "ftrain", "experiments", "tests", ".ci")
    files = [f"/{path.relative_to(ROOT).as_posix()}" for room in rooms for path in (ROOT / room).rglob("*.py")]
    named = set(re.findall(r"`([\w/.]*\w\.py)`", text))
    assert [path for path in sorted(named) if not any(file.endswith(f"/{path}") for file in files)] == []
