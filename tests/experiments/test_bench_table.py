"""A file of results tells when and on what its figures were measured."""

import json
from datetime import date
from pathlib import Path

import torch

from experiments.bench.table import publish, row

RESULTS = Path(__file__).parents[2] / "experiments" / "bench" / "results"


def test_figures_are_written_with_the_day_and_the_machine(tmp_path, capsys):
    publish([row("a save", 3.0, "ms", goal=5.0, how="median of 5")], "saves", tmp_path / "new" / "saves.json")
    assert "a save" in capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "saves.json").read_text())
    assert [(r["name"], r["value"], r["ok"]) for r in found["rows"]] == [("a save", 3.0, True)]
    assert (found["date"], found["torch"]) == (date.today().isoformat(), torch.__version__)
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["card"] is None or torch.cuda.is_initialized()


def test_every_file_of_results_has_a_date_and_says_what_it_knows_of_its_machine():
    for file in sorted(RESULTS.glob("*.json")):
        found = json.loads(file.read_text())
        date.fromisoformat(found["date"])
        assert "torch" in found, file.name
        assert {"cpu", "cores", "card"} <= found.keys() or "device" in found, file.name
