"""Both sides of the bench of video transformers train the same model on the same clip, and distillation is counted."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from experiments.bench import dit, dit_distilled


@pytest.mark.parametrize("adapted", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_steps_of_both_sides_have_the_same_losses(adapted):
    rows = dit.compare(dit.QUICK, dit.Options(device="cpu", quick=True), adapted=adapted)
    assert rows[1].ok is None  # False where the losses differ
    assert "each layer recomputed" in rows[1].name


def test_an_iteration_of_distribution_matching_is_counted_in_forward_passes():
    found = dit_distilled.iteration(quick=True)
    assert found.ok
    # a critic's update runs 2.5 steps and one that is differentiated; a student's once in five asks three models too
    assert 6.0 < found.value < 8.2
