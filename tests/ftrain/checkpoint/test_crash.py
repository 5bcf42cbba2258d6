"""Real kills of a real process; the long form is experiments/bench/crash.py."""

import pytest

from experiments.bench.crash import Crash, run_kills, state_of, verified_step
from ftrain.checkpoint import save


@pytest.mark.parametrize("database", [True, False])
def test_the_latest_step_survives_kill_9_at_random_moments(tmp_path, database):
    hits = list(run_kills(Crash(kills=5, mib=0.5, database=database, seed=1), tmp_path))
    assert len(hits) == 5
    assert "while writing" in hits


def test_the_check_itself_finds_a_lost_and_a_wrong_step(tmp_path):
    save(state_of(3, 0.1), tmp_path, 3)
    assert verified_step(tmp_path, 3, 0.1) == 3
    with pytest.raises(RuntimeError, match="step 4 was saved, and now the latest is 3"):
        verified_step(tmp_path, 4, 0.1)
    save(state_of(4, 0.1), tmp_path, 5)
    with pytest.raises(RuntimeError, match="step 5 restores with 10 leaves that differ"):
        verified_step(tmp_path, 5, 0.1)
