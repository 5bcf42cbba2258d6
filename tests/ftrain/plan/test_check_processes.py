"""`ftrain plan --check` on several ranks: one rank searches and prints, all run what was found."""

import pytest

from tests.helpers.rank_processes import run_script

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
    script = tmp_path / "ftrain_plan.py"
    cache = str(tmp_path / "cache")
    script.write_text(f"import os\nfrom ftrain.cli.main import main\nos.environ['FTRAIN_CACHE'] = {cache!r}\nmain()\n")
    done, other = run_script(
        script, 2,
        "plan", str(tmp_path / "mine_experiment.py"), "--gpus", "2", "--tokens", "256", "--traced", "1",
        "--processes", "1", "--remat", "none", "--no-rings", "--check", "1", "--apply", str(tmp_path / "plan.json"),
    )  # fmt: skip
    assert (done.code, other.code) == (0, 0), done.stdout + done.stderr + other.stderr
    assert other.stdout == ""
    assert done.stdout.count("2 packs of 256 tokens a step on 2 x h100") == 1
    table = done.stdout[done.stdout.index("measured on it") :]
    row = next(line for line in table.splitlines() if "remat none" in line)
    ratios = [float(cell) for i, cell in enumerate(row.split("│")[1:-1]) if i in (3, 6)]
    assert ratios[0] > 0
    assert ratios[1] == pytest.approx(1.0, abs=0.15)
    assert (tmp_path / "plan.json").exists()
