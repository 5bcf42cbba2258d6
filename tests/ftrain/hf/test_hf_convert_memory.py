"""`ftrain convert` both ways, in memory that does not grow with the model."""

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ftrain.hf.save import HfWriter
from ftrain.hf.shards import Entry
from ftrain.modules import decoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.hf_config import hf_config
from ftrain.modules.hf_names import decoder_names
from ftrain.modules.moe import MoEConfig
from ftrain.modules.spec import leaves_with_paths
from tests.helpers import hf_convert_memory

BIG = DecoderConfig(
    vocab=32_000,
    d_model=512,
    layers=6,
    attention=AttentionConfig(512, heads=8, kv_heads=2, head_dim=64, qk_norm=True),
    moe=MoEConfig(512, 512, experts=32, top_k=2),
)
SHARD = 52_000_000


def write_big(folder: Path) -> None:
    """376 MB of random bfloat16 weights in 8 files; stacks of experts and the two tables are larger than a part."""
    entries = {path: Entry(leaf.shape, torch.bfloat16) for path, leaf in leaves_with_paths(decoder.specs(BIG))}
    with HfWriter(folder, hf_config(BIG), entries, decoder_names(BIG), max_shard=SHARD) as writer:
        for path, entry in entries.items():
            writer.write(path, torch.randint(-(2**15), 2**15, entry.shape, dtype=torch.int16).view(torch.bfloat16))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")
def test_memory_stays_below_two_files(tmp_path: Path) -> None:
    write_big(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 8
    script = Path(hf_convert_memory.__file__)
    folders = [str(tmp_path / name) for name in ("hf", "run", "back")]
    command = [sys.executable, str(script), *folders, str(SHARD)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    grown = {line.split()[1]: int(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("grown")}
    assert set(grown) == {"in", "out"}
    assert max(grown.values()) < 2 * SHARD
    back = {file.name: file for file in (tmp_path / "back").iterdir()}
    assert set(back) == {file.name for file in (tmp_path / "hf").iterdir()}
    assert all(filecmp.cmp(tmp_path / "hf" / name, file, shallow=False) for name, file in back.items())
