"""Clips of several sizes become steps: each once in an epoch, with packs of about equal cost."""

from collections import Counter

import numpy as np
import pytest
import torch

from ftrain.bridge.pipelines import WanFolder
from ftrain.data.clips import cache
from ftrain.data.clips.cache import EncodedClip
from ftrain.modules.families.wan_config import PUBLISHED, config
from ftrain.run.clip_batches import cost_of
from ftrain.run.clip_data import ClipOptions, make_clip_data
from ftrain.run.clip_encoders import weights_of
from ftrain.sharding import Mesh
from tests.helpers.tiny_wan import TINY
from tests.helpers.tiny_wan_pipeline import write_pipeline

SIZES = ((4, 3, 4, 6), (4, 2, 4, 6), (4, 1, 4, 6), (4, 2, 2, 6))
"""Of latents: 18, 12, 6 and 6 patches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, and beside it `cache` with 40 clips, whose numbers tell which they are."""
    root = tmp_path_factory.mktemp("clips")
    write_pipeline(root / "wan", transformer={**TINY, "num_layers": 1})
    folder = WanFolder.open(root / "wan")
    config = {"shards": 2, "vae": weights_of(folder, "vae"), "text_encoder": weights_of(folder, "text_encoder")}
    cache.begin(root / "cache", config)
    cache.write_whole(root / "cache" / cache.EMPTY, {"text": torch.zeros(1, 12)}, {})
    clips = []
    for n in range(40):
        size = SIZES[n % 4]
        tensors = {"latents": torch.full(size, float(n)), "text": torch.full((n % 5, 12), float(n))}
        clips.append(
            EncodedClip(f"{n}.0", f"{n}.mp4", f"clip {n}", (4 * size[1] - 3, 8 * size[2], 8 * size[3]), tensors)
        )
    for shard in range(2):
        cache.write_shard(cache.shard_of(root / "cache", shard), clips[20 * shard : 20 * shard + 20], [])
    return folder


def data_of(folder, *, ranks=1, rank=0, world=1, **options):
    made = ClipOptions((folder.path.parent / "cache",), **options)
    mesh = Mesh(shard=ranks, kind="virtual")
    return make_clip_data(made, folder, part="transformer", mesh=mesh, rank=rank, world=world, drop=0.0, seed=0)


def test_each_clip_comes_once_in_an_epoch_in_packs_of_about_equal_cost(folder):
    data = data_of(folder, ranks=2, held_out=0.1, tokens=36)
    assert (
        "40 clips of 1x32x48, 5x16x48, 5x32x48, 9x32x48; 4 of them are held out; 2 packs of 36 patches" in data.lines[0]
    )
    seen, apart = Counter[int](), []
    for step in data.loader:
        batch = step.batch
        assert batch["data"].shape == (72, 16)
        valid = batch["labels"] == 0
        assert torch.equal(batch["data"][~valid], torch.zeros(int((~valid).sum()), 16))
        for clip in batch["clip"][valid].unique().tolist():
            rows, text = batch["data"][batch["clip"] == clip], batch["text"][batch["text_clip"] == clip]
            number = int(rows[0, 0])
            assert rows.eq(number).all()  # nobody else's
            assert len(rows) == (18, 12, 6, 6)[number % 4]
            assert text[: number % 5].eq(number).all()
            assert not text[number % 5 :].any()
            seen[number] += 1
        apart.append(step.facts.imbalance)
    held = [int(clip.key.partition(".")[0]) for clip in data.held]
    assert seen == Counter(set(range(40)) - set(held))
    assert sum(apart[:-1]) / len(apart[:-1]) < 0.1
    counted = sum(int((batch["labels"] == 0).sum()) for batch in data.held_out)
    assert counted == sum((18, 12, 6, 6)[n % 4] for n in held)


def test_a_process_reads_only_the_clips_that_it_trains_on(folder):
    """Of others the shapes are as they are."""
    mine = [next(iter(data_of(folder, ranks=2, rank=rank, world=2).loader)).batch for rank in (0, 1)]
    both = next(iter(data_of(folder, ranks=2).loader)).batch
    half = len(both["data"]) // 2
    for rank, own in enumerate((slice(0, half), slice(half, None))):
        assert torch.equal(mine[rank]["data"][own], both["data"][own])
        assert torch.equal(mine[rank]["labels"], both["labels"])
        assert torch.equal(mine[rank]["segments"].offsets_N, both["segments"].offsets_N)
    assert not torch.equal(mine[0]["data"], mine[1]["data"])


def test_a_clip_costs_the_flops_of_its_forward_pass():
    """Of 81 frames of 480 x 832 in Wan 2.1's 1.3B 283 TFLOPs, of which 70% are attention among its patches."""
    cost = cost_of(config(PUBLISHED["2.1-t2v-1.3b"]))
    rows = 21 * 30 * 52
    assert float(cost(np.array([rows]))[0]) == pytest.approx(283.0e12, rel=2e-3)
    assert cost.quadratic * rows**2 == pytest.approx(0.70 * 283.0e12, rel=1e-2)


def test_a_damaged_clip_is_left_out(folder, tmp_path):
    import shutil

    shutil.copytree(folder.path.parent, tmp_path / "all")
    there = WanFolder.open(tmp_path / "all/wan")
    file = tmp_path / "all/cache/shards/00001.safetensors"
    content = bytearray(file.read_bytes())
    data = data_of(there, rejected=1.0)
    whole = sum(step.facts.documents for step in data.loader)
    file.write_bytes(bytes(content[: len(content) // 2]))
    found = [next(iter(data.loader)).batch for _ in range(1)]
    assert whole == 39  # one is held out
    assert found
    with pytest.raises(ValueError, match=r"00001.safetensors is damaged or no safetensors file"):
        data_of(there)
