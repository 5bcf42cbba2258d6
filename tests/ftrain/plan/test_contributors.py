"""Where the time of a step goes, in words."""

from experiments.decoder_plan import DecoderWorkload
from ftrain.analysis.cluster import cluster
from ftrain.modules.decoder import preset
from ftrain.plan.contributors import Contributor, contributors, why
from ftrain.plan.lowering import lower
from ftrain.plan.space import Candidate

OPS = {Contributor("bmm", "layers.*.moe", "step"): 9e6, Contributor("mm", "head.w_DV", "forward"): 1e6}


def test_a_step_far_from_its_bound_is_explained_largest_first():
    first, *rows = why(10.5, 1.0, 0.5, OPS, rows=1).splitlines()
    assert "10500 ms a step, 10.5 times the 1000 ms" in first
    assert [" ".join(row.split()) for row in rows] == [
        "9000 ms bmm of layers.*.moe (step)",
        "1000 ms 1 other kinds of ops",
        "500 ms messages that compute waits for",
    ]


def test_a_step_near_its_bound_needs_no_words():
    assert not why(1.2, 1.0, 0.1, OPS)


def test_contributors_add_up_to_the_compute_of_a_step_and_layers_are_one():
    h100, layout = cluster("h100"), Candidate(1, 4, 1, 1, None, 1, "none")
    workload = DecoderWorkload("tiny", preset("llama-tiny"), tokens=512, packs=4, segmented=False)
    few, more = (lower(workload.make({"layers": n}, layout), layout, h100) for n in (2, 3))
    found = contributors(more.ordered, more.times)
    total = sum(more.times.microseconds(n) for n in more.ordered.graph.nodes)
    assert abs(sum(found.values()) - total) < 1e-6 * total
    paths = [{c.path for c in contributors(x.ordered, x.times)} for x in (few, more)]
    assert paths[0] == paths[1]
    assert "state.params.layers.*.mlp" in paths[0]
