"""The demonstration of distillation: films as rows, the judge's measures, and the whole workflow at a smoke size."""

import json

import numpy as np
import pytest
import torch

import ftrain
from experiments.distill import __main__ as job
from experiments.distill.films import WORDS, Film, Source, all_words
from experiments.distill.judge import frechet, moments, motion_error
from experiments.distill.painter import Painter
from experiments.distill.samples import samplers
from experiments.omni.digits import split
from ftrain import key
from ftrain.modules.velocity import guided

FILM = Film()
SOURCE = Source(split()[0], FILM)


def test_films_are_rows_and_back_and_a_batch_is_a_function_of_its_number():
    rows_NP, words_BW = SOURCE.batch(5, seed=0, number=3)
    assert rows_NP.shape == (5 * FILM.rows, 16)
    films_BSHW = FILM.to_films(rows_NP.numpy())
    np.testing.assert_array_equal(FILM.to_rows(films_BSHW), rows_NP.numpy())
    assert motion_error(films_BSHW, words_BW, speed=1) < 1e-6
    other = words_BW.clone()
    other[:, 1] = 10 + (other[:, 1] - 10) // 2 * 2 + (other[:, 1] + 1) % 2  # the opposite way
    assert motion_error(films_BSHW, other, speed=1) == pytest.approx(2)
    assert torch.equal(SOURCE.batch(5, seed=0, number=3).rows_NP, rows_NP)
    assert not torch.equal(SOURCE.batch(5, seed=0, number=4).words_BW, words_BW)
    assert len({tuple(pair) for pair in all_words(2).tolist()}) * 2 == len(all_words(2)) == 80
    assert WORDS[10:14] == ("left", "right", "up", "down")


def test_the_frechet_distance_of_shifted_and_scaled_features_is_known():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((4000, 3)))
    mean, covariance = moments(features)
    assert frechet(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    moved = moments(2 * features + 1)
    assert frechet(mean, covariance, *moved) == pytest.approx(3 + 3, rel=0.05)


def test_both_sides_of_guidance_in_one_pass_are_two_passes():
    painter = Painter(FILM, width=16, layers=1)
    params = ftrain.tree.map(lambda p: p + 0.1, ftrain.init(painter.specs, key(0)))
    words_BW = all_words(1)[:3]
    x_NP, time_N = ftrain.normal(key(1), (3 * FILM.rows, 16)), torch.full((3 * FILM.rows,), 0.4)
    nothing = torch.full_like(words_BW, len(WORDS) - 1)
    apart = guided(painter.velocity(params, words_BW), painter.velocity(params, nothing), 2.5)
    together = painter.guided(params, words_BW, 2.5)
    torch.testing.assert_close(together(x_NP, time_N), apart(x_NP, time_N), rtol=1e-4, atol=1e-5)
    parts = painter.frames(x_NP)
    assert len(parts) == 3
    assert torch.equal(painter.joined(parts), x_NP)


def test_calls_are_counted_as_the_network_is_called():
    painter = Painter(FILM, width=16, layers=1)
    params, words_BW = ftrain.init(painter.specs, key(0)), all_words(1)[:2]
    noise_NP = ftrain.normal(key(1), (2 * FILM.rows, 16))
    calls = []

    class Counted(Painter):
        def velocity(self, params, words_BW):
            return lambda x, t: (calls.append(len(words_BW) // 2), Painter.velocity(self, params, words_BW)(x, t))[1]

        def chunk(self, params, words_BW):
            return lambda *given: (calls.append(1), Painter.chunk(self, params, words_BW)(*given))[1]

    for name, sampler in samplers(Counted(FILM, 16, 1), 2.5).items():
        calls.clear()
        assert sampler.make(params, words_BW, noise_NP, key(2)).shape == noise_NP.shape
        assert sum(calls) == int(sampler.calls.split()[0]), name
    assert painter.film == FILM


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_workflow_runs_and_a_finished_one_is_measured_again(tmp_path, capsys):
    """Eagerly: tracing eight small steps would take most of the time."""
    options = job.Options(out=tmp_path, small=True, films=1, threads=1)
    with ftrain.disable_jit():
        assert job.main(options) == 0
        first, said = json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr().out
        assert job.main(options) == 0
    again, later = json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr().out
    assert "frames 2: critic" in said
    assert "frames 2: critic" not in later
    assert (tmp_path / "films.png").stat().st_size > 1000
    del first["seconds"], again["seconds"]
    assert first == again
    assert set(first) == {"real", "teacher", "consistency", "four", "one", "frames"}
