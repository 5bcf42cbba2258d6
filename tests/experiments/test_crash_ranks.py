"""Real kills of processes that save together; the long form is experiments/bench/crash.py --ranks 2."""

from experiments.bench.crash_ranks import KINDS, run_rank_kills
from experiments.bench.crash_state import Crash
from ftrain.checkpoint import latest


def test_the_latest_step_survives_kills_of_one_rank_and_of_all(tmp_path):
    hits = list(run_rank_kills(Crash(kills=3, mib=0.5, ranks=2, seed=1), tmp_path))
    assert [kind for kind, _ in hits] == list(KINDS)
    assert (latest(tmp_path) or 0) >= 3
