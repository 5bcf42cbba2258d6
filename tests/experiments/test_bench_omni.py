"""Both sides of the bench of models that see and hear are given the same samples: packed here, padded there."""

import pytest
import torch

from experiments.bench import cached_media, omni_samples
from experiments.bench.omni import Options

pytest.importorskip("transformers", minversion="5.24")


@pytest.mark.parametrize("kind", omni_samples.KINDS)
def test_packs_and_rows_hold_the_same(kind):
    said = omni_samples.config(kind, quick=True)
    cfg = omni_samples.media_of(said)
    hears = cfg.sound is not None
    batches = omni_samples.packs(said, 3, tokens=1024, quick=True)
    budgets = omni_samples.budgets(batches, hears=hears)
    assert set(budgets) == ({"patches", "chunks"} if hears else {"patches"})
    for batch in batches:
        pack, rows = omni_samples.pack(batch, tokens=1024), omni_samples.padded(batch, hears=hears)
        used = sum(len(one["tokens"]) for one in batch)
        assert 900 < used <= 1024
        real = rows["attention_mask"].bool()
        assert torch.equal(rows["input_ids"][real], pack["tokens"][:used])
        assert (rows["labels"] != -100).sum() == (pack["labels"] != -100).sum() > 0
        # theirs are labels of their own places, ours of the places before them
        assert torch.equal(rows["labels"][rows["labels"] != -100], pack["labels"][pack["labels"] != -100])
        seen = sum(int(pack[name].prod(1).sum()) for name in ("image_grid_thw", "video_grid_thw") if name in pack)
        places = sum(int((pack["tokens"] == token).sum()) for token in (cfg.image, cfg.video))
        assert places * cfg.square == seen <= budgets["patches"]
        assert ("input_features" in rows) == ("sound" in pack)


def test_steps_by_rows_have_the_losses_of_steps_by_towers():
    time, memory = cached_media.compare("qwen3-omni", Options(tokens=256, quick=True))
    assert time.ok is None  # False where the losses differ
    assert "by rows over that by towers" in memory.name
