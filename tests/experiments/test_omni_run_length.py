"""A run that goes on may be made longer: its length, its learning rate, and what is said."""

from pathlib import Path

import pytest
import torch

from experiments.omni.run_length import Length, continued, earlier_of, made_longer
from experiments.omni.training import TrainConfig, schedule

RUN = Path("runs/1")


def rates(cfg: TrainConfig, *counts: int) -> list[float]:
    return [float(schedule(cfg)(torch.tensor(count))) for count in counts]


def test_a_run_goes_on_as_long_as_it_was_or_longer() -> None:
    assert continued({"steps": 200}, None, done=50, run=RUN) == Length(200)
    assert continued({"steps": 200}, 200, done=200, run=RUN) == Length(200)
    longer = continued({"steps": 200}, 400, done=200, run=RUN)
    assert longer == Length(400, ((200, 200),), longer=True)
    again = {"steps": longer.steps, "earlier": [list(length) for length in longer.earlier]}
    assert continued(again, 600, done=300, run=RUN).earlier == ((200, 200), (300, 400))
    assert continued(again, 600, done=100, run=RUN).earlier == ((100, 400),)
    assert continued({"steps": 200}, 400, done=0, run=RUN).earlier == ()
    with pytest.raises(ValueError, match=r"has --steps 200, not 100: .* never shorter; give --steps 200 or more"):
        continued({"steps": 200}, 100, done=10, run=RUN)


def test_what_a_config_says_is_checked() -> None:
    with pytest.raises(ValueError, match="earlier"):
        earlier_of({"earlier": [["much", "longer"]]})
    with pytest.raises(ValueError, match="steps"):
        continued({"steps": "many"}, 7, done=0, run=RUN)


def test_the_learning_rate_is_that_of_the_new_length_from_there_on_and_before_as_it_was() -> None:
    short, whole = TrainConfig(steps=200), TrainConfig(steps=400)
    longer = TrainConfig(steps=400, earlier=((200, 200),))
    assert rates(longer, 0, 30, 100, 199) == rates(short, 0, 30, 100, 199)
    assert rates(longer, 200, 300, 399) == rates(whole, 200, 300, 399)
    assert rates(longer, 199)[0] < rates(longer, 200)[0] / 10
    twice = TrainConfig(steps=400, earlier=((100, 150), (200, 200)))
    assert rates(twice, 99, 150, 250) == [
        rates(c, n)[0] for c, n in ((TrainConfig(150), 99), (short, 150), (whole, 250))
    ]


def test_a_constant_rate_does_not_depend_on_the_length() -> None:
    cfgs = [TrainConfig(steps=steps, decay="constant") for steps in (20, 400)]
    assert rates(cfgs[0], 0, 30, 60, 1000) == rates(cfgs[1], 0, 30, 60, 1000) == pytest.approx([0, 1e-3, 2e-3, 2e-3])


def test_it_is_said_what_becomes_of_the_learning_rate() -> None:
    longer = Length(400, ((200, 200),), longer=True)
    cosine = TrainConfig(steps=400, earlier=longer.earlier)
    assert made_longer(longer, cosine) == (
        "the run is made longer after step 200, from 200 to 400 steps: its data go on, and the learning rate is that "
        "of 400 steps from here on: 0.00129, where it was 4e-05"
    )
    assert "does not depend on the length" in made_longer(longer, TrainConfig(steps=400, decay="constant"))
