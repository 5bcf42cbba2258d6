"""What ops cost on a GPU that is not there, and what a program of them and of messages takes."""

from dataclasses import replace

import pytest
import torch
from torch import fx

from experiments.decoder_plan import DecoderWorkload
from ftrain.analysis.cluster import cluster
from ftrain.analysis.device_ops import DeviceTimes, device_workspace
from ftrain.analysis.flops import node_flops, node_traffic
from ftrain.graph.collectives import COLLECTIVES, WAIT
from ftrain.modules.decoder import preset
from ftrain.passes.overlap import simulate_schedule
from ftrain.plan.cluster_links import collective_microseconds, simulate_on_cluster
from ftrain.plan.liveness_by_region import peak_by_region
from ftrain.plan.lowering import draft, lower
from ftrain.plan.space import Candidate
from ftrain.sharding import Mesh, Ulysses

H100 = cluster("h100")
CANDIDATE = Candidate(1, 4, 2, 1, Ulysses(), 1, "layer")
WORKLOAD = DecoderWorkload("tiny", preset("llama-tiny"), tokens=4096, packs=4, segmented=False)


@pytest.fixture(scope="module")
def lowered():
    return lower(WORKLOAD.make({"layers": 2}, CANDIDATE), CANDIDATE, H100)


def nodes_of(module, op):
    return [n for n in module.graph.nodes if op in str(n.target)]


def test_products_and_attention_reach_their_shares_of_the_peak_of_bfloat16(lowered):
    shares = H100.efficiency
    for op, share in (("attention_forward", shares.attention), ("linear_cross_entropy", shares.matmul)):
        node = nodes_of(lowered.plain, op)[0]
        compute, memory = node_flops(node) / (H100.bf16 * share), node_traffic(node) / (3.35e12 * shares.bandwidth)
        found = DeviceTimes(H100).microseconds(node)
        assert found == pytest.approx(shares.launch + 1e6 * max(compute, memory))


def test_attention_within_documents(lowered):
    slow = H100.with_efficiency(attention=1e-6)  # so that nothing but its products counts
    node = nodes_of(lowered.plain, "attention_backward")[0]
    whole, half = (DeviceTimes(slow, attention_share=s).microseconds(node) - 3 for s in (1.0, 0.5))
    assert half == pytest.approx(whole / 2)


def test_views_waits_and_messages_do_not_compute(lowered):
    times = DeviceTimes(H100)
    for op in ("aten.view", "wait_tensor", "gather_ranks", "all_to_all"):
        assert all(times.microseconds(n) == 0 for n in nodes_of(lowered.plain, op))


def test_workspaces_are_those_of_the_kernels_of_a_gpu(lowered):
    backward = nodes_of(lowered.plain, "attention_backward")[0]
    q, k = (backward.args[i].meta["val"] for i in (1, 2))
    tokens, heads, width = q.shape
    sums = (tokens + 128) * heads * (-(-width // 32) * 32 + 1) * 4  # the kernel works on widths in steps of 32
    expanded = 0 if k.shape[1] == heads else 2 * q.numel() * 2
    assert device_workspace(backward) == sums + expanded
    assert device_workspace(nodes_of(lowered.plain, "attention_forward")[0]) == 0
    assert all(device_workspace(n) == 0 for n in nodes_of(lowered.plain, "aten.") if "sum" not in str(n.target))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_with_one_kind_of_link_it_is_the_schedule_of_ftrain(micro_batches):
    """On a node that holds all ranks each collective costs the same as on one link, in rounds of loops too."""
    one, candidate = replace(H100, gpus_per_node=8), replace(CANDIDATE, micro_batches=micro_batches)
    lowered = lower(replace(WORKLOAD, packs=16).make({"layers": 2}, candidate), candidate, one)
    found = simulate_on_cluster(lowered.ordered, lowered.mesh, times=lowered.times, cluster=one)
    expected = simulate_schedule(lowered.ordered, lowered.mesh, times=lowered.times, link=one.link(lowered.mesh))
    assert found.compute == pytest.approx(expected.compute)
    assert found.communication == pytest.approx(expected.communication)
    assert found.exposed == pytest.approx(expected.exposed)


def test_an_exchange_within_a_node_does_not_wait_for_the_network():
    """A gather over nodes is under way when an exchange within one begins, whose result is wanted first."""
    mesh = Mesh(1, 4, 2, kind="fake")
    pairs = replace(H100, gpus_per_node=2)
    kinds = {kind: op for op, kind in COLLECTIVES.items()}
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(1 << 20, device="meta")
    gather = graph.call_function(kinds["all_gather"], (x, 4, mesh.group("shard").name))
    exchange = graph.call_function(kinds["all_to_all"], (x, None, None, mesh.group("sequence").name))
    for message in (exchange, gather):
        graph.call_function(WAIT, (message,))
    graph.output(x)
    found = simulate_on_cluster(fx.GraphModule({}, graph), mesh, times=DeviceTimes(pairs), cluster=pairs)
    far, near = (collective_microseconds(n, mesh, pairs) for n in (gather, exchange))
    assert near < far
    assert found.step == found.exposed == pytest.approx(far)
    assert found.communication == pytest.approx(far + near)


def test_compute_that_messages_slow_down(lowered):
    slowed = replace(H100, efficiency=replace(H100.efficiency, compute_while_sending=1.5))
    fast, slow = (
        simulate_on_cluster(lowered.ordered, lowered.mesh, times=lowered.times, cluster=c) for c in (H100, slowed)
    )
    assert fast.step < slow.step < 1.5 * fast.step


def test_rounds_of_a_loop_add_up():
    """Micro-batches: messages and compute of a round, as often as it runs; memory of one."""
    tallies, peaks = [], []
    for micro in (2, 4):
        candidate = Candidate(1, 4, 1, 1, None, micro, "none")
        workload = DecoderWorkload("tiny", preset("llama-tiny"), tokens=512, packs=4 * micro, segmented=False)
        found = lower(workload.make({"layers": 1}, candidate), candidate, H100)
        tallies.append(simulate_on_cluster(found.ordered, found.mesh, times=found.times, cluster=H100))
        peaks.append(max(peak_by_region(found.plain).values()))
    assert 1.6 < tallies[1].communication / tallies[0].communication < 2.0
    assert 1.6 < tallies[1].compute / tallies[0].compute < 2.0
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


def test_paths_of_any_depth_have_the_same_moments():
    kinds = []
    for layers in (2, 5):
        found = lower(WORKLOAD.make({"layers": layers}, CANDIDATE), CANDIDATE, H100)
        kinds.append({kind for kind in peak_by_region(found.plain) if not kind[1].endswith("inner")})
    assert kinds[0] == kinds[1]
    assert ("backward", "state.params.layers.first") in kinds[0]


def test_a_cpu_has_no_number():
    """To a trace "cpu:0" is another device than that of the arrays which a step makes."""
    on_cpus, plain = replace(H100, device_type="cpu"), Candidate(1, 2, 1, 1, None, 1, "none")
    drafted = draft(WORKLOAD.make({"layers": 1}, plain), plain, on_cpus)
    devices = {n.meta["val"].device for n in drafted.module.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    assert devices == {torch.device("cpu")} == {drafted.setting.device}
