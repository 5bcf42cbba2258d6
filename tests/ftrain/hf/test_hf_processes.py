"""Parameters in place: each of several processes fills its parts from the files, one process all of them."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import ftrain
from ftrain.hf import fill_hf, load_hf
from ftrain.modules import decoder
from ftrain.modules.hf_names import decoder_names
from ftrain.sharding import Mesh
from tests.helpers import hf_processes
from tests.helpers.hf_twins import build


@pytest.mark.slow
def test_each_rank_fills_what_it_holds_and_together_they_save_it(tmp_path: Path) -> None:
    model, cfg = build("qwen3-moe")
    given, written = tmp_path / "hf", tmp_path / "hf.again"
    model.save_pretrained(given, max_shard_size="40KB")
    equal, held, failures = zip(*hf_processes.run(str(given), cfg, Mesh(shard=2, expert=2)), strict=True)
    assert equal == (True, True)
    assert max(held) < 0.6 * model.num_parameters()
    weights = [path.name for path in given.glob("*.safetensors*")]
    assert len(weights) > 2
    assert all((written / name).read_bytes() == (given / name).read_bytes() for name in weights)
    assert failures[0].startswith("NotADirectoryError")
    assert failures[1].startswith("RuntimeError: rank 0 could not write the weights: NotADirectoryError")


def test_parameters_of_one_process_are_overwritten_in_place(tmp_path: Path) -> None:
    model, cfg = build("llama-tied", torch.bfloat16)
    model.save_pretrained(tmp_path)
    params = ftrain.init(decoder.specs(cfg), ftrain.key(0))
    table = params["embedding"]["table_VD"]
    fill_hf(params, tmp_path, decoder_names(cfg))
    assert params["embedding"]["table_VD"] is table
    torch.testing.assert_close(params, load_hf(tmp_path, decoder.specs(cfg), decoder_names(cfg)), rtol=0, atol=0)
