"""Times of ops travel as a file: what one machine measured, another plans by."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ftrain
from ftrain.analysis.cluster import cluster
from ftrain.analysis.device_ops import DeviceTimes
from ftrain.analysis.op_times import OpTimes, Speed, cache_file, op_key, read_times
from ftrain.cli.plan import PlanOptions, _machine

SPEED = Speed("a card", {torch.float32: 1e12}, bandwidth=1e11, host_link=1e10, launch=3.0)


def product_node():
    """A product in a lowered step, and its key."""

    def loss(w, x):
        return (x @ w).square().sum()

    lowered = ftrain.jit(ftrain.value_and_grad(loss)).lower(torch.randn(8, 4), torch.randn(2, 8))
    node = next(n for n in lowered.graph.graph.nodes if n.target is torch.ops.aten.mm.default)
    return node, op_key(node)


def test_what_was_saved_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRAIN_CACHE", str(tmp_path))
    node, key = product_node()
    file = OpTimes(SPEED, {key: 77.5}).save()
    assert file == cache_file("a card") == tmp_path / "op-times-a-card.json"
    assert OpTimes(SPEED, read_times(file)).microseconds(node) == 77.5
    assert OpTimes(SPEED).microseconds(node) < 77.5


def test_a_plan_for_a_card_goes_by_the_times_that_were_brought_from_it(tmp_path: Path) -> None:
    node, key = product_node()
    file = tmp_path / "op-times-NVIDIA-H100.json"
    file.write_text(json.dumps({key: 77.5}))
    options = PlanOptions(Path("experiments/decoder_plan.py"), gpu="h100", op_times=file)
    assert DeviceTimes(_machine(options)).microseconds(node) == 77.5
    unmeasured = DeviceTimes(_machine(replace(options, op_times=None)))
    assert unmeasured.microseconds(node) == DeviceTimes(cluster("h100")).microseconds(node) != 77.5


@pytest.mark.parametrize("text", ["[1, 2]", '{"aten.mm": "fast"}', '{"aten.mm": -1}', '{"aten.mm": NaN}', "{"])
def test_what_is_no_table_of_times_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "times.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"times\.json.*(is not a table of ops' microseconds|cannot be read)"):
        read_times(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json: cannot be read as times of ops"):
        read_times(tmp_path / "nowhere.json")
