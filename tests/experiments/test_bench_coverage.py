"""The bench of models that exist: a row is equal, refused with a sentence, or wrong, and says which."""

from dataclasses import replace

import pytest
import torch

from experiments.bench import coverage
from experiments.bench.coverage import Coverage
from experiments.bench.covering import causal_lm, checks, page
from experiments.bench.covering.case import Case, NoPeer
from experiments.bench.covering.checks import Apart, Cell, Outcome, compared, tried

pytest.importorskip("transformers", minversion="5")


@pytest.mark.slow
def test_a_row_runs_in_a_process_and_is_a_line_of_the_page(tmp_path):
    file, shown = tmp_path / "coverage-causal_lm.json", tmp_path / "coverage.md"
    options = Coverage(
        set=("causal_lm",), only=("gpt2",), columns=("equal", "sequence", "expert"), json=file, page=shown
    )
    (found,) = coverage.main(options)
    assert found.verdict == "equal", found
    verdicts = {c: cell.verdict for c, cell in found.cells.items()}
    assert verdicts == {"builds": "equal", "equal": "equal", "sequence": "equal", "expert": "-"}
    assert page.read(file) == (found,)
    assert "| gpt2 | packed | equal |  |  | equal | - |  |" in shown.read_text()
    assert coverage.main(replace(options, resume=True)) == ()


@pytest.mark.slow
def test_a_row_that_takes_too_long_is_a_row(tmp_path):
    (found,) = coverage.main(Coverage(set=("causal_lm",), only=("gpt2",), limit_s=0.1))
    assert (found.verdict, found.cells["builds"]) == ("breaks", Cell("breaks", "it did not end in time"))


def test_numbers_that_differ_are_not_equal_even_where_the_plain_gradient_is_zero():
    wanted = {"w": torch.ones(4), "untouched": None}
    same = {"w": torch.ones(4), "untouched": torch.zeros(2)}
    assert compared(2.0, same, 2.0, wanted) == "loss 0e+00, gradients 0e+00"
    for loss, grads in (
        (2.001, same),
        (2.0, {**same, "w": torch.tensor([1.0, 1, 1, 1.001])}),
        (2.0, {**same, "untouched": torch.ones(2)}),
        (2.0, {**same, "w": torch.full((4,), torch.nan)}),
    ):
        with pytest.raises(Apart):
            compared(loss, grads, 2.0, wanted)


def fails(error: Exception) -> Case:
    def build():
        raise error

    return Case("causal_lm", "it", build)


@pytest.mark.parametrize(
    ("case", "verdict"),
    [(fails(KeyError("x")), "breaks"), (fails(ValueError("of a test")), "breaks"), (fails(NoPeer("x")), "no_peer")],
)
def test_errors_are_told_apart_by_whose_words_they_are(case, verdict):
    assert dict(tried(case))["builds"].verdict == verdict


def test_a_refusal_is_a_sentence_of_ours():
    def build():
        return checks.Mesh(shard=-1)

    found = dict(tried(Case("causal_lm", "it", build)))["builds"]
    assert found.verdict == "refused", found


def test_the_worse_of_building_and_computing_is_the_verdict_of_a_row():
    assert Outcome("causal_lm", "it", {"builds": Cell("equal"), "equal": Cell("not_equal")}).verdict == "not_equal"
    assert Outcome("causal_lm", "it", {"builds": Cell("refused")}).verdict == "refused"
    assert Outcome("causal_lm", "it", {"builds": Cell("equal"), "equal": Cell("equal")}).verdict == "equal"


def test_columns_that_are_tried_later_join_the_row(tmp_path):
    file, made = tmp_path / "coverage-causal_lm.json", {"builds": Cell("equal")}
    page.write(
        [Outcome("causal_lm", "it", {**made, "equal": Cell("equal"), "saved": Cell("breaks")}, "rows", 2.0)], file
    )
    page.write([Outcome("causal_lm", "it", {**made, "saved": Cell("equal")}, "rows", 1.0)], file)
    wanted = {**made, "equal": Cell("equal"), "saved": Cell("equal")}
    assert page.read(file) == (Outcome("causal_lm", "it", wanted, "rows", 2.0),)
    refused = Outcome("causal_lm", "it", {"builds": Cell("refused", "why")}, "", 1.0)
    page.write([refused], file)
    assert page.read(file) == (refused,)


def test_a_name_that_no_set_has_is_refused():
    with pytest.raises(ValueError, match="no row 'of_nobody'"):
        coverage.chosen(Coverage(set=("causal_lm",), only=("of_nobody",)))
    assert len(causal_lm.names()) > 150
