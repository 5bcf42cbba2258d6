"""The report page: complete, self-contained, and safe to open."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from ftrain.analysis.memory_timeline import inputs_by_argument, memory_timeline
from ftrain.plan.jit import jit
from ftrain.remat.fit import decisions
from ftrain.remat.policy import Remat
from ftrain.report.step_page import component, show_flops
from ftrain.report.timeline import MOST_POINTS, thin_out
from ftrain.trace.accumulate import accumulate
from tests.helpers.momentum_steps import momentum_state, momentum_step, stack_batch, stack_loss, stack_params


@pytest.fixture
def compiled():
    return jit(momentum_step(stack_loss), donate="state").lower(momentum_state(stack_params()), stack_batch())


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "input", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(compiled, tmp_path):
    file = compiled.report(tmp_path / "new" / "step.html")
    text = file.read_text()
    tags = Tags(text)
    assert not tags.open
    assert not tags.links
    assert tags.seen.count("table") == 4
    assert "<title>step · ftrain</title>" in text
    assert text.count("<tr>") > len(compiled.executed.graph.nodes)
    for path in compiled.traced.input_paths:
        assert path in text
    named = compiled.report(tmp_path / "named.html", title="tiny <stack>, run 3").read_text()
    assert "<title>tiny &lt;stack&gt;, run 3 · ftrain</title>" in named


def test_names_are_escaped(tmp_path):
    def step(state):
        return {"<script>alert(1)</script>": state["<script>alert(1)</script>"] + 1}

    step.__name__ = "<b>bold</b>"
    compiled = jit(step).lower({"<script>alert(1)</script>": torch.ones(3)})
    text = compiled.report(tmp_path / "step.html").read_text()
    assert "<script>alert" not in text
    assert "<b>bold" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_step_without_ops_has_a_report(tmp_path):
    assert "has no ops" in jit(lambda x: x).lower(torch.ones(3)).report(tmp_path / "r.html").read_text()


@pytest.mark.parametrize("micro_batches", [None, 2])
def test_the_timeline_is_the_plan_by_kind(micro_batches):
    loss, (x, y) = stack_loss, stack_batch()
    if micro_batches:
        loss, x, y = accumulate(stack_loss, 2, stacked=True), x.reshape(2, 4, 16), y.reshape(2, 4, 16)
    compiled = jit(momentum_step(loss), donate="state").lower(momentum_state(stack_params()), (x, y))
    samples = memory_timeline(compiled.executed)
    assert max(s.total for s in samples) == compiled.memory().peak
    assert any(s.loop for s in samples) == bool(micro_batches)
    forward, backward, *_ = (max(s.bytes[k] for s in samples) for k in range(4))
    assert forward > 0
    assert backward > 0
    assert sum(inputs_by_argument(compiled.executed).values()) == compiled.memory().inputs
    assert set(inputs_by_argument(compiled.executed)) == {"state.params", "state.momentum", "state", "batch"}


def test_long_timelines_keep_their_peak(compiled):
    samples = memory_timeline(compiled.executed) * 100
    shown = thin_out(samples)
    assert len(shown) <= MOST_POINTS < len(samples)
    assert max(s.total for s in shown) == max(s.total for s in samples)


def test_the_pictures_texts_match_its_points(compiled, tmp_path):
    text = compiled.report(tmp_path / "r.html").read_text()
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', text)
    assert len(json.loads(data)) == len(memory_timeline(compiled.executed))


def test_a_budget_has_its_book_and_both_timelines(tmp_path):
    args = momentum_state(stack_params()), stack_batch()
    compiled = jit(momentum_step(stack_loss), donate="state", remat=Remat(us_per_mb=1e9)).lower(*args)
    text = compiled.report(tmp_path / "r.html").read_text()
    tags = Tags(text)
    assert not tags.open
    assert tags.seen.count("table") == 5
    assert text.count('<svg class="memory"') == 2
    book = text[text.index("Recompute by return on investment") :]
    assert book.count(">recompute<") == sum(r.decision == "recompute" for r in decisions(compiled.graph)) > 0


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("state.params.foundation.layers.3.moe.w_EDF", "foundation.layers.*.moe"),
        ("state.opt_state.0.mu.layers.1.w", "opt_state.*.mu.layers"),
        ("state.params.head", "head"),
        ("state.step", "state"),
        ("batch.tokens", "batch"),
        ("", "(none)"),
    ],
)
def test_components_of_paths(path, name):
    assert component(path) == name


def test_flops_are_short():
    assert [show_flops(n) for n in (0, 999, 2_100_000_000)] == ["–", "999 FLOP", "2.1 GFLOP"]
