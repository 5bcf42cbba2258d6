"""The recommender's experiment: its metrics beside scikit-learn's, its world, and both models on it."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from experiments.recommend import __main__ as command
from experiments.recommend import features, metrics, world
from experiments.recommend.foundation import Foundation

SMALL = world.WorldConfig(people=40, films=60, held_out_people=40, new_films=20, impressions=8)


def test_areas_and_losses_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    label_N, score_N = rng.integers(2, size=400), rng.integers(20, size=400) / 20  # with many ties
    assert metrics.auc(score_N, label_N) == pytest.approx(roc_auc_score(label_N, score_N))
    assert metrics.log_loss(score_N * 0.9 + 0.05, label_N) == pytest.approx(log_loss(label_N, score_N * 0.9 + 0.05))
    person_N = rng.integers(30, size=400)
    told = [(np.sum(person_N == p), roc_auc_score(label_N[person_N == p], score_N[person_N == p])) for p in range(30)]
    assert metrics.gauc(score_N, label_N, person_N) == pytest.approx(
        np.average([v for _, v in told], weights=[c for c, _ in told])
    )


def test_the_world_is_a_function_of_its_seed_and_tells_the_past() -> None:
    (train, held_out), (again, _) = world.make(SMALL), world.make(SMALL)
    for a, b in zip(train.seen, again.seen, strict=True):
        np.testing.assert_array_equal(a, b)
    seen, people = train.seen, SMALL.people
    later = slice(people, 2 * people)  # the next impression of each person
    np.testing.assert_array_equal(seen.past_film_NH[later, -1], seen.film_N[:people])
    np.testing.assert_array_equal(seen.past_clicked_NH[later, -1], seen.clicked_N[:people])
    np.testing.assert_array_equal(seen.past_film_NH[later, :-1], seen.past_film_NH[:people, 1:])
    assert not (seen.converted_N & ~seen.clicked_N).any()
    assert ((seen.watch_N > 0) == seen.clicked_N).all()
    assert train.seen.film_N.max() < train.known <= held_out.seen.film_N.max()


def test_nothing_that_is_asked_for_stands_in_what_is_read() -> None:
    train, _ = world.make(SMALL)
    foundation = Foundation()
    read = features.of_split(train, tables=foundation.tables, vision=foundation.vision)
    assert not read.events["did"][:, -1].any()
    assert not read.events["watch"][:, -1].any()
    assert not read.events["topic"][:, -1].any()


def test_both_models_train_and_are_judged(tmp_path: Path) -> None:
    rows = command.main(command.Options(steps=4, batch=64, people=40, json=tmp_path / "found.json"))
    by_name = {row.name: row for row in rows}
    assert {"1 - CTR AUC", "1 - CTCVR GAUC", "watch error", "CVR calibration, of clicks"} <= set(by_name)
    assert all(np.isfinite([row.value, row.peer]).all() for row in rows)
    assert (tmp_path / "found.json").is_file()
