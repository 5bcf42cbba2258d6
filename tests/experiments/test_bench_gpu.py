"""The bench of a GPU without one: a stage that fails or hangs ends alone, and what it told until then is kept."""

import json
import os
import sys
from pathlib import Path

import pytest

import ftrain
from experiments.bench import gpu
from experiments.bench.card.boxed import run_boxed
from experiments.bench.card.decoders import SMALL, training
from experiments.bench.card.telling import attempt, heard, note, tell
from experiments.bench.table import row

SPAWNS_A_WORKER = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(worker.pid, flush=True)
{end}
"""


def boxed(script: str, seconds: float = 60.0):
    command = [sys.executable, "-c", script]
    return run_boxed(command, seconds=seconds, folder=Path.cwd(), environment=dict(os.environ))


@pytest.mark.parametrize(
    ("end", "seconds", "ended"),
    [("", 60.0, "ok"), ("sys.exit(3)", 60.0, "exit 3"), ("worker.wait()", 3.0, "stopped after 3 s")],
)
def test_a_box_ends_with_all_that_was_started_in_it(end: str, seconds: float, ended: str) -> None:
    ran = boxed(SPAWNS_A_WORKER.format(end=end), seconds)
    assert ran.ended == ended
    state = Path(f"/proc/{ran.lines[0]}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"  # dead, and nobody asks for it


def test_what_was_told_before_the_end_is_kept(capsys: pytest.CaptureFixture) -> None:
    note("device", "a card")
    tell(row("a step", 12.5, "ms", how="once"), row("a peak", 3.0, "GiB", goal=2.0, how="once"))
    tell(row("a step", 11.5, "ms", how="again"))
    lines = [*capsys.readouterr().out.splitlines(), "a warning", '@row {"name": "cut o']
    found = heard(lines)
    assert found.notes == {"device": "a card"}
    assert {name: (r.value, r.ok) for name, r in found.rows.items()} == {"a step": (11.5, None), "a peak": (3.0, False)}


def test_a_part_that_fails_is_a_row_and_the_next_goes_on(capsys: pytest.CaptureFixture) -> None:
    attempt("first", lambda: [][0])
    attempt("second", lambda: row("second", 1.0, "ms", how="once"))
    captured = capsys.readouterr()
    found = heard(captured.out.splitlines())
    assert (found.rows["first"].value, found.rows["first"].ok) == (None, False)
    assert "IndexError" in found.rows["first"].how
    assert "IndexError" in captured.err
    assert found.rows["second"].value == 1.0


@pytest.mark.slow
def test_without_a_card_each_stage_fails_alone_and_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(gpu.Options(out=tmp_path, only=("machine", "profile"), tiny=True, limit=200)) == 1
    stages = json.loads((tmp_path / "gpu.json").read_text())
    assert stages["machine"]["ended"] == "exit 1"
    assert stages["machine"]["tail"]
    assert "===== profile" in (tmp_path / "stages.log").read_text()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {r["name"]: r["ok"] for r in rows} == {"profile: dense": False, "profile: moe": False}


def test_an_unknown_stage_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"no stage is called sped; stages are machine, right, speed"):
        gpu.Options(only=("sped",))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_flops_that_mfu_counts_are_those_of_the_graph(kind: str) -> None:
    """But for causal attention, which the graph's rule counts the same way only where documents are whole packs."""
    size = SMALL[kind]
    made = training(size, backend="aten", compute="float32", device="cpu")
    cost = made.step.lower(made.state, made.batch).cost()
    products = sum(n.flops for n in cost.nodes if "attention" not in n.op and n.phase != "step")
    s = size.shape
    attention = 6.0 * s.layers * size.tokens * s.heads * s.head_dim * size.length
    assert products == pytest.approx(size.flops - attention, rel=0.01)


def test_sizes_of_a_rehearsal_learn() -> None:
    made = training(SMALL["dense"], backend="aten", compute="float32", device="cpu")
    state, losses = made.state, []
    for _ in range(4):
        state, metrics = made.step(state, made.batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert isinstance(made.step, ftrain.Step)
