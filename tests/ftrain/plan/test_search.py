"""A small search from end to end: ranked, refused with reasons, shown, written and read back."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
from rich.console import Console

from experiments.decoder_plan import DecoderWorkload
from ftrain.analysis.cluster import cluster
from ftrain.cli.plan import PlanOptions, load_workload, run, tokens_of
from ftrain.graph.text import show_bytes
from ftrain.modules.decoder import preset
from ftrain.plan.check import check_best
from ftrain.plan.estimate import Estimate
from ftrain.plan.file import PlanFile, load_plan
from ftrain.plan.outcomes import Outcomes, with_ways_out
from ftrain.plan.page import front_figure, pareto, write_page
from ftrain.plan.search import Options, search
from ftrain.plan.space import Candidate, Rejected, Space, grouped, layouts
from ftrain.plan.table import GIB, print_result
from ftrain.sharding import Ulysses

WORKLOAD = DecoderWorkload("tiny", preset("llama-tiny"), tokens=256, packs=4, segmented=False)
SPACE = Space(remats=("none",), rings=False)
H100 = cluster("h100")
EXPERIMENT = """
from experiments.decoder_plan import DecoderWorkload
from ftrain.modules.decoder import preset

def plan_for_search(*, tokens, packs):
    return DecoderWorkload("mine", preset("llama-tiny"), tokens=tokens, packs=packs, segmented=False)
"""


@pytest.fixture(scope="module")
def result():
    return search(WORKLOAD, 4, H100, Options(traced=3, space=SPACE))


def test_every_layout_is_ranked_estimated_or_rejected(result):
    legal, illegal = layouts(4, WORKLOAD.model_shape, SPACE)
    priced, rest = [p.candidate for p in result.prices], [c for c, _ in result.untraced]
    assert len(priced) == 3
    assert sorted(map(str, [*priced, *rest])) == sorted(map(str, legal))
    assert result.rejected == illegal
    assert [p.seconds for p in result.prices] == sorted(p.seconds for p in result.prices)


def test_what_does_not_fit_is_rejected_with_its_bytes(tmp_path):
    tight = cluster("h100").with_efficiency(fragmentation=1e6)
    found = search(WORKLOAD, 4, tight, Options(traced=3, space=SPACE))
    assert not found.prices
    refused = [r for r in found.rejected if "needs more than the 7" in r.reason]
    assert refused
    assert all(r.needs > 70 * GIB for r in refused)
    assert {r.fits.partition(": ")[2] for r in refused} == {"more GPUs, fewer tokens, or more recompute"}
    html = write_page(found, tmp_path / "plan.html", title="tight", cluster=tight).read_text()
    assert "No layout fits" in html
    assert "more GPUs, fewer tokens, or more recompute" in html


def test_what_does_not_fit_is_shown_the_nearest_that_does(result):
    fits = result.prices[0]
    wide = replace(fits.candidate, micro_batches=64)
    (told,) = with_ways_out([Rejected("wide", 1, "too large", needs=90e9, candidate=wide)], result.prices, 0.9)
    assert told.fits.endswith(f"{fits.candidate} needs {show_bytes(int(fits.peak))}")
    (alone,) = with_ways_out([Rejected("wide", 1, "too large", needs=90e9, candidate=wide)], [], 0.9)
    assert alone.fits.endswith("a GPU like h200")


def test_rejections_of_one_reason_are_one_row_named_after_the_least():
    rows = [Rejected(name, 2, "too large", needs=needs) for name, needs in (("a", 3.0), ("b", 2.0))]
    assert list(grouped([*rows, Rejected("c", 1, "odd")])) == [
        Rejected("b and 1 more", 4, "too large", needs=2.0),
        Rejected("c", 1, "odd"),
    ]


def test_what_holds_no_less_than_one_that_was_far_too_large_is_refused_untraced(result):
    model, same = WORKLOAD.model_shape, Estimate(seconds=1.0, memory=50.0)
    outcomes = Outcomes(limit=100.0, rejected=[])
    large = Candidate(1, 4, 1, 1, None, 1, "none")
    outcomes.enter(large, same, replace(result.prices[0], candidate=large, peak=200.0), model)
    assert outcomes.hopeless(Candidate(2, 2, 1, 1, None, 1, "none"), same, model)
    assert not outcomes.hopeless(Candidate(2, 2, 1, 1, None, 1, "layer"), same, model)
    assert not outcomes.hopeless(Candidate(1, 1, 4, 1, Ulysses(), 4, "none"), same, model)
    assert not outcomes.hopeless(Candidate(2, 2, 1, 1, None, 1, "none"), Estimate(1.0, memory=40.0), model)
    assert outcomes.expected(Candidate(2, 2, 1, 1, None, 1, "none"), Estimate(1.0, memory=40.0)) == 160.0
    assert [r.number for r in outcomes.rejected] == [1, 1]
    assert not outcomes.prices


def test_no_legal_layout_is_said():
    with pytest.raises(ValueError, match=r"tiny has no legal layout on 5 ranks: .*4 packs in a step are fewer"):
        search(WORKLOAD, 5, H100, Options(space=SPACE))


def test_the_terminal_shows_the_best_first_and_the_reasons(result):
    console = Console(width=200, record=True, file=io.StringIO())
    print_result(result, title="four", console=console)
    text = console.export_text()
    best = result.prices[0]
    assert text.index(str(best.candidate)) < text.index(str(result.prices[-1].candidate))
    assert f"{best.tokens_per_second:,.0f}" in text
    assert f"{len(result.untraced)} legal layouts were estimated" in text


def test_the_page_has_every_layout_and_the_front(result, tmp_path):
    html = write_page(result, tmp_path / "plan.html", title="a <b> title", cluster=H100).read_text()
    assert "a &lt;b&gt; title" in html
    assert html.count("<circle") == len(result.prices) + len(result.untraced) + 3  # and one of each kind in the legend
    assert all(str(p.candidate) in html for p in result.prices)
    assert front_figure([]) == "<p>No layout fits.</p>"


def test_no_layout_beats_one_of_the_front(result):
    front = pareto(result.prices)
    for p in result.prices:
        beaten = [q for q in front if q.peak <= p.peak and q.tokens_per_second >= p.tokens_per_second]
        assert beaten
        assert (p in front) == (beaten == [p])


def test_a_plan_is_written_and_read(result, tmp_path):
    plan = PlanFile.of(result.prices[0], WORKLOAD, H100)
    file = plan.save(tmp_path / "plan.json")
    assert load_plan(file) == plan
    assert (plan.tokens, plan.packs) == (256, 4)
    assert plan.predicted["peak_bytes"] == round(result.prices[0].peak)
    made = plan.plan(kind="virtual")
    assert (made.mesh, made.default) == (plan.candidate.mesh("virtual"), plan.candidate.layout)
    assert made.link == H100.link(made.mesh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("tokens"), "is not a plan of version 2"),
        (lambda d: d["layout"].update(attention="spiral"), "plan.json: attention 'spiral'"),
        (lambda d: d["components"].update(a={"kind": "ring"}), "plan.json: components.a has no 'parameters'"),
        (lambda d: d["batch"].update(a={"kind": "heaps"}), "plan.json: batch rule 'heaps' is not one of tokens"),
        (
            lambda d: d["layout"].update(shard=10**12),
            "plan.json: layout.shard is 1000000000000, not a whole",
        ),
        (lambda d: d.update(tokens=True), "plan.json: tokens is True, not a whole number from 1"),
        (
            lambda d: d["link"].update(bandwidth=math.nan),
            "plan.json: link.bandwidth is nan, not a number",
        ),
        (
            lambda d: d["layout"].update(replicate=1, shard=1, sequence=1, expert=2),
            "plan.json: Mesh: expert=2 does not divide shard",
        ),
        (lambda d: d["batch"].update({"*" * 3000: {"kind": "same"}}), "a name in batch is .* at most 256 characters"),
    ],
)
def test_a_broken_plan_is_named(result, tmp_path, change, message):
    file = tmp_path / "plan.json"
    with pytest.raises(ValueError, match="there is no such plan"):
        load_plan(file)
    PlanFile.of(result.prices[0], WORKLOAD, H100).save(file)
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_plan(file)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_experiment.py").write_text(EXPERIMENT)
    plan = tmp_path / "plan.json"
    options = PlanOptions(
        tmp_path / "my_experiment.py", gpus=2, tokens="1K", traced=2, processes=1, rings=False, remat=("layer",),
        apply=plan, html=tmp_path / "plan.html",
    )  # fmt: skip
    assert run(options) == 0
    assert "mine: 2 packs of 1024 tokens a step on 2 x h100" in capsys.readouterr().out
    assert load_plan(plan).candidate.remat == "layer"
    assert (tmp_path / "plan.html").exists()


def test_the_command_estimates_alone_or_says_that_it_traced_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_estimate.py").write_text(EXPERIMENT)
    estimates = PlanOptions(tmp_path / "my_estimate.py", gpus=2, tokens="1K", traced=0, rings=False)
    assert run(estimates) == 0
    assert run(replace(estimates, apply=tmp_path / "plan.json")) == 1
    assert capsys.readouterr().out.count("no layout was traced: --traced 1 prices the most promising one") == 2


def test_check_runs_the_best_on_this_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_checked.py").write_text(EXPERIMENT)
    file = tmp_path / "my_checked.py"
    options = PlanOptions(file, gpus=1, tokens="256", traced=1, processes=1, remat=("none",), check=1)
    assert run(options) == 0
    assert "measured" in capsys.readouterr().out


def test_check_needs_as_many_ranks():
    price = search(WORKLOAD, 2, H100, Options(traced=1, space=SPACE)).prices[0]
    with pytest.raises(ValueError, match=r"--check runs on this run's 1 rank, but the layout is for 2"):
        check_best([price], WORKLOAD, console=Console())


def test_the_command_line():
    words = [
        "experiments/omni_moe.py",
        "--gpus",
        "128",
        "--gpu",
        "h200",
        "--tokens",
        "160K",
        "--remat",
        "none",
        "layer",
        "--apply",
        "plan.json",
    ]
    options = tyro.cli(PlanOptions, args=words)
    assert (options.experiment, options.gpus, options.gpu) == (Path("experiments/omni_moe.py"), 128, "h200")
    assert (options.remat, options.apply) == (("none", "layer"), Path("plan.json"))


@pytest.mark.parametrize(("text", "tokens"), [("8192", 8192), ("160K", 163_840), ("1m", 1 << 20)])
def test_tokens(text, tokens):
    assert tokens_of(text) == tokens


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="give a number, with K or M"):
        tokens_of("many")
    with pytest.raises(ValueError, match="there is no such experiment"):
        load_workload(tmp_path / "none.py", 1, 1)
    empty = tmp_path / "empty_experiment.py"
    empty.write_text("")
    with pytest.raises(ValueError, match="has no function plan_for_search"):
        load_workload(empty, 1, 1)


def test_a_plan_of_a_trial_is_that_of_the_layout():
    candidate = Candidate(1, 2, 2, 1, Ulysses(), 1, "none")
    plan = WORKLOAD.make({"layers": 1}, candidate).plan(candidate)
    assert (plan.mesh, plan.default) == (candidate.mesh(), candidate.layout)
