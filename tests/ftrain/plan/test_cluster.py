"""Prices of collectives follow from where the ranks of an axis are."""

import pytest
import torch

from ftrain.analysis.cluster import CLUSTERS, Efficiency, cluster
from ftrain.sharding import Mesh

MESH = Mesh(2, 4, 8, 16, "fake")  # 64 ranks on 8 nodes; sequence within a node, shard across four, replicate across two


@pytest.mark.parametrize(
    ("axes", "span"),
    [
        (("sequence",), (8, 1, 8)),
        (("shard",), (4, 4, 1)),
        (("shard", "sequence"), (32, 4, 8)),
        (("replicate",), (2, 2, 1)),
        (("expert",), (16, 2, 8)),
        (("expert_shard",), (2, 2, 1)),
        (("ulysses:4",), (4, 1, 4)),
        (("ring:4",), (2, 1, 2)),
    ],
)
def test_where_the_members_of_a_group_are(axes, span):
    assert cluster("h100").span(MESH, axes) == span


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "shift_ranks"])
def test_a_node_is_faster_than_the_network(name, kind):
    c, sent = cluster(name), 1e8
    assert c.microseconds(kind, sent, MESH, ("sequence",)) < c.microseconds(kind, sent, MESH, ("shard",))


def test_the_price_is_a_latency_and_bytes_over_a_bandwidth():
    c = cluster("h100").with_efficiency(nvlink=1.0, network=1.0)
    price = lambda kind, axes, sent=1e9: c.microseconds(kind, sent, MESH, axes)  # noqa: E731
    assert price("all_gather", ("sequence",), 0) == c.nvlink_latency
    assert price("all_gather", ("shard",), 0) == c.nvlink_latency + 2 * c.network_latency
    assert price("all_gather", ("sequence",)) - c.nvlink_latency == pytest.approx(1e15 / 450e9)
    # one member a node: its own adapter; eight: all adapters of the node together, up to NVLink
    assert price("all_gather", ("shard",)) - price("all_gather", ("shard",), 0) == pytest.approx(1e15 / 50e9)
    assert price("all_gather", ("shard", "sequence")) - 32 == pytest.approx(1e15 / 400e9)
    # 8 of the 15 others are on the other node, behind the rank's own adapter
    assert price("all_to_all", ("expert",)) - 22 == pytest.approx(1e15 * 8 / 15 / 50e9)


def test_a_gather_s_link_is_its_price():
    c = cluster("b200")
    link = c.link(MESH)
    assert link.microseconds(3e8) == pytest.approx(c.microseconds("all_gather", 3e8, MESH, ("shard", "sequence")))


def test_speed_and_peak():
    c = cluster("h200")
    assert c.speed().flops_of(torch.bfloat16) == c.bf16 == 989.4e12
    assert c.speed().bandwidth == c.memory_bandwidth * c.efficiency.bandwidth


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="nearest: 'h100'"):
        cluster("h10")
    with pytest.raises(ValueError, match=r"Efficiency\(matmul=1.2\)"):
        cluster("h100").with_efficiency(matmul=1.2)
    with pytest.raises(ValueError, match="factors of at least 1"):
        Efficiency(fragmentation=0.9)
