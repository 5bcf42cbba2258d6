"""The bench of a pretrained model, on a small one that is not: all sides make the same losses and texts."""

import json

import pytest
import torch

from experiments.bench import pretrained
from experiments.bench.pretrained import Options
from experiments.bench.pretrained_files import HALVES, LENGTHS, packed
from tests.helpers.model_folders import write_model

transformers = pytest.importorskip("transformers", minversion="5")


@pytest.mark.slow
def test_all_sides_make_the_same_losses_and_texts(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3,
    )  # fmt: skip
    write_model(config, tmp_path / "model")
    rows = {
        r.name: r
        for r in pretrained.main(Options(folder=tmp_path / "model", steps=2, new=5, json=tmp_path / "rows.json"))
    }
    wanted = [f"losses apart, {side}, {where}" for side in ("native", "bridged") for where in pretrained.MESHES]
    assert [rows[name].ok for name in wanted] == [True] * 6
    assert [rows[f"text that differs, {side}"].value for side in ("native", "bridged")] == [0, 0]
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == len(rows)


def test_the_middle_of_a_pack_is_within_a_document_or_between_two():
    texts = tuple(torch.full((length,), i) for i, length in enumerate(LENGTHS))
    half = sum(LENGTHS) // 2
    for order, within in ((None, True), (HALVES, False)):
        segments = packed(texts, order)["segments"]
        assert bool(segments[half - 1] == segments[half]) == within
