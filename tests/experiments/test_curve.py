"""Losses told in lines, of a training that was stopped and went on."""

from experiments.curve import Curve


def test_lines_are_means_and_of_steps_done_twice_the_last(tmp_path) -> None:
    told: list[str] = []
    first = Curve(tmp_path / "run" / "losses.jsonl", 2, told.append)
    assert first.rows() == []
    for number, loss in enumerate((4.0, 2.0, 1.0), start=1):
        first.log("a", number, {"text": loss})
    assert first.rows() == [{"stage": "a", "step": 2, "text": 3.0}]
    again = Curve(first.file, 2, told.append)  # from before step 1, and on into another stage
    for stage, number, loss in (("a", 1, 3.0), ("a", 2, 2.0), ("b", 1, 1.0), ("b", 2, 1.0)):
        again.log(stage, number, {"text": loss})
    assert again.rows() == [{"stage": "a", "step": 2, "text": 2.5}, {"stage": "b", "step": 2, "text": 1.0}]
    assert len(told) == 3
