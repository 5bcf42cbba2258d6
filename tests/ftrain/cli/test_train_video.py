"""`ftrain train video`: clips of several sizes, full and with an adapter; runs go on to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("av")

from ftrain import lora
from ftrain.bridge.native_wan import native_wan
from ftrain.cli.main import main
from ftrain.run.encoding import EncodeJob, encode
from ftrain.run.folder import read_metrics
from tests.helpers.tiny_wan import TINY
from tests.helpers.tiny_wan_pipeline import write_film, write_films, write_pipeline

CPU = torch.device("cpu")
DATA = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pipeline of two experts in `wan`, and a cache of five clips of two sizes in `cache`."""
    root = tmp_path_factory.mktemp("video")
    write_pipeline(root / "wan", boundary=0.875, transformer={**TINY, "num_layers": 1})
    write_films(root / "films", 3)
    for i in (3, 4):
        write_film(root / f"films/tall_{i}.mkv", frames=6, size=(48, 32), seed=i)
        (root / f"films/tall_{i}.txt").write_text("tall")
    job = EncodeJob(root / "wan", root / "films", root / "cache", sizes=("9x32x48", "5x48x32"))
    encode(job, device=CPU, say=lambda _: None)
    return root


def train(root, out, *more, steps=4, held_out="0"):
    constant = ("--decay", "constant", "--warmup", "0", "--rate", "1e-3")
    return main([
        "train", "video", "--model", str(root / "wan"), "--data", str(root / "cache"), "--out", str(out),
        "--steps", str(steps), "--held-out", held_out, "--every.evaluate", "2", *constant, *more,
    ])  # fmt: skip


def test_a_run_learns_and_goes_on_to_the_bit(root, tmp_path):
    """Packs of 18 patches hold one clip of 9 frames or one of 5; captions are left out at times."""
    how = ("--packs", "2", "--video.drop", "0.2", "--part", "transformer_2")
    assert train(root, tmp_path / "whole", *how) == 0
    assert train(root, tmp_path / "half", *how, steps=2) == 0
    assert train(root, tmp_path / "half", *how) == 0
    whole, half = (load_file(tmp_path / name / "transformer_2" / DATA) for name in ("whole", "half"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    before = load_file(root / "wan/transformer_2" / DATA)
    assert not torch.equal(whole["proj_out.weight"], before["proj_out.weight"])
    assert main(["export", str(tmp_path / "half"), "--to", str(tmp_path / "exported")]) == 0
    exported = load_file(tmp_path / "exported/transformer_2" / DATA)
    assert all(torch.equal(half[name], exported[name]) for name in half)
    losses = [row["loss"] for row in read_metrics(tmp_path / "whole")]
    assert len(losses) == 4
    assert [row["loss"] for row in read_metrics(tmp_path / "half")] == losses


def test_an_adapter_is_written_in_the_forms_of_others(root, tmp_path):
    more = ("--lora.rank", "2", "--lora.targets", "to_q", "net.2", "--formats", "comfyui", "diffusers", "kohya")
    assert train(root, tmp_path, *more, "--ema", "0.5", "--part", "transformer_2", held_out="0.2") == 0
    rows = [row for row in read_metrics(tmp_path) if "held_out" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    times = [float(name.removeprefix("held_out/at_")) for name in rows[0] if name.startswith("held_out/")]
    assert len(times) == 5
    assert max(times) < 0.875  # of this expert
    assert rows[-1]["held_out"] < rows[0]["held_out"]
    model = native_wan(root / "wan/transformer_2")
    adapter, _ = lora.load(tmp_path / "adapter", model)
    assert len(adapter.targets) == 3  # two queries and an MLP
    heads = {name: load_file(tmp_path / f"{name}.safetensors") for name in ("comfyui", "diffusers", "kohya")}
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in heads["comfyui"]
    assert "transformer.blocks.0.attn1.to_q.lora_A.weight" in heads["diffusers"]
    assert "lora_unet_blocks_0_self_attn_q.lora_down.weight" in heads["kohya"]
    assert not (tmp_path / "transformer_2").exists()


def refused(capsys, *arguments):
    assert train(*arguments) == 2
    return capsys.readouterr().err


def test_what_does_not_belong_together_is_refused_before_the_run_s_folder_exists(root, tmp_path, capsys):
    out = tmp_path / "run"
    told = refused(capsys, root, out, "--video.low", "0.2")
    assert "--video.low 0.2: transformer is for times from 0.875 to 1; take times of this range" in told
    told = refused(capsys, root, out, "--tokens", "17")
    assert "--tokens 17: the largest clip has 18 patches, which is the least" in told
    told = refused(capsys, root, out, "--show.videos", "1")
    assert "transformer is for times from 0.875 to 1, and a film needs all: take ftrain sample with both" in told
    told = refused(capsys, root, out, "--show.videos", "1", "--shard", "2")
    assert "films are made on one rank, and this run has 2" in told
    assert "--packs 3 do not divide among 2 ranks" in refused(capsys, root, out, "--packs", "3", "--shard", "2")
    assert "has no transformer_3: its parts are" in refused(capsys, root, out, "--part", "transformer_3")
    other = write_pipeline(tmp_path / "other", seed=1)
    told = refused(capsys, root, out, "--model", str(other))
    assert "do not belong together: the cache in" in told
    assert "was made with text_encoder = that of" in told
    (root / "cache/shards/00000.safetensors").rename(tmp_path / "kept")
    try:
        assert "has 0 of 1 shards: the same `ftrain encode`" in refused(capsys, root, out)
    finally:
        (tmp_path / "kept").rename(root / "cache/shards/00000.safetensors")
    config = root / "cache/cache.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "condition": None, "shards": "1"}))
    try:
        assert "shards" in refused(capsys, root, out)
    finally:
        config.write_text(before)
    assert not out.exists()
