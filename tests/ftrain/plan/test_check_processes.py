"""`ftrain plan --check` under torchrun: one rank searches and prints, all run what was found."""

import os
import subprocess
import sys

import pytest

EXPERIMENT = """
from experiments.decoder_plan import DecoderWorkload
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.attention import AttentionConfig

def plan_for_search(*, tokens, packs):
    heads = AttentionConfig(64, heads=4, kv_heads=2, head_dim=16)
    cfg = DecoderConfig(256, 64, layers=1, attention=heads, d_hidden=128)
    return DecoderWorkload("mine", cfg, tokens=tokens, packs=packs, segmented=False, compute="float32")
"""


@pytest.mark.slow
def test_two_processes_check_the_best_layout(tmp_path):
    (tmp_path / "mine_experiment.py").write_text(EXPERIMENT)
    root = os.getcwd()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ftrain.cli.main",
        "plan", "mine_experiment.py", "--gpus", "2", "--tokens", "256", "--traced", "1", "--processes", "1",
        "--remat", "none", "--no-rings", "--check", "1", "--apply", "plan.json",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "FTRAIN_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 packs of 256 tokens a step on 2 x h100") == 1
    table = done.stdout[done.stdout.index("measured on it") :]
    row = next(line for line in table.splitlines() if "remat none" in line)
    ratios = [float(cell) for i, cell in enumerate(row.split("│")[1:-1]) if i in (3, 6)]
    assert ratios[0] > 0
    assert ratios[1] == pytest.approx(1.0, abs=0.15)
    assert (tmp_path / "plan.json").exists()
