"""Clusters: what their devices compute, hold and send, and what a collective over some axes of a mesh costs there.

A collective's price is `latency + bytes / bandwidth` (alpha-beta). Which links it uses follows from where the members
of a group are: rank i is GPU `i % gpus_per_node` of node `i // gpus_per_node`, so an axis inside a node uses NVLink and
one across nodes the network.

Peak figures are those of the vendors' data sheets; `Efficiency` says which share of them a step reaches.
"""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ftrain.analysis.op_times import Speed
from ftrain.sharding.link import Link
from ftrain.sharding.mesh import Mesh

GIB = 1 << 30


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak figures that a step reaches, and what costs time or memory beside its ops.

    `matmul`, `attention`, `grouped`: of FLOP/s, of dense products, of attention kernels and of products of groups of
    rows (experts). `bandwidth`: of the memory's. `nvlink`, `network`: of the links'. `launch`: microseconds that a
    kernel takes beyond its work. `fragmentation`: memory that the allocator reserves over what is alive at the peak.
    `compute_while_sending`: how much slower compute is while a message is under way, since collectives take SMs and
    memory bandwidth.

    `matmul` and `network` are fitted on two published rows (see experiments/bench/plan_vs_published.py): programs whose
    ops are not joined by a compiler. The others are what is commonly measured: FlashAttention-2 reaches 35-40 % of an
    H100's peak forward and backward (Shah et al. 2024, figure 5), nccl-tests about 80 % of NVLink's data sheet for
    large messages.
    """

    matmul: float = 0.44
    attention: float = 0.38
    grouped: float = 0.45
    bandwidth: float = 0.8
    nvlink: float = 0.8
    network: float = 0.5
    launch: float = 3.0
    fragmentation: float = 1.0
    compute_while_sending: float = 1.0

    def __post_init__(self) -> None:
        for name in ("matmul", "attention", "grouped", "bandwidth", "nvlink", "network"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Efficiency({name}={getattr(self, name)}): a share of the peak is in (0, 1]")
        if self.fragmentation < 1 or self.compute_while_sending < 1:
            raise ValueError(f"{self}: fragmentation and compute_while_sending are factors of at least 1")


class Span(NamedTuple):
    """Where a group's members are: how many in all, on how many nodes, and the most on one node."""

    ranks: int
    nodes: int
    on_a_node: int


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    `flops`: dense FLOP/s by dtype. `memory`: bytes of a GPU that a process can use. `memory_bandwidth`: bytes/s.
    `nvlink`, `network`: bytes/s that one GPU sends, in one direction, within its node and out of it.
    `nvlink_latency`, `network_latency`: microseconds of a collective within a node, and for each doubling of nodes.
    `device_type`: "cuda" or "cpu", whose kernels' workspaces count. `measured`: microseconds of single ops, over the
    roofline (see `ftrain.analysis.op_times.op_key`).
    """

    name: str
    gpus_per_node: int
    flops: Mapping[torch.dtype, float]
    memory: float
    memory_bandwidth: float
    nvlink: float
    network: float
    nvlink_latency: float = 12.0
    network_latency: float = 10.0
    efficiency: Efficiency = field(default_factory=Efficiency)
    device_type: str = "cuda"
    measured: Mapping[str, float] = field(default_factory=dict, repr=False)

    @property
    def bf16(self) -> float:
        """Peak FLOP/s in bfloat16: what MFU is a share of."""
        return self.flops[torch.bfloat16]

    def span(self, mesh: Mesh, axes: tuple[str, ...]) -> Span:
        """Where the ranks are that differ in `axes`; of several groups, the one over most nodes."""
        return _span(mesh, axes, self.gpus_per_node)

    def microseconds(self, kind: str, sent: float, mesh: Mesh, axes: tuple[str, ...]) -> float:
        """How long a collective takes in which each rank sends `sent` bytes; kinds are those of
        `ftrain.sharding.link`.
        """
        span = self.span(mesh, axes)
        return self._latency(span) + 1e6 * sent / self._bandwidth(kind, span)

    def link(self, mesh: Mesh, axes: tuple[str, ...] = ("shard", "sequence")) -> Link:
        """The link that a gather over `axes` sees: by it small messages are joined and collectives are started."""
        span = self.span(mesh, axes)
        return Link(self._latency(span), self._bandwidth("all_gather", span))

    def speed(self) -> Speed:
        """A GPU as `OpTimes` takes it."""
        e = self.efficiency
        return Speed(
            self.name,
            self.flops,
            self.memory_bandwidth * e.bandwidth,
            host_link=25e9,
            launch=e.launch,
            efficiency=e.matmul,
        )

    def with_efficiency(self, **shares: float) -> "Cluster":
        """The same cluster with other constants."""
        return replace(self, efficiency=replace(self.efficiency, **shares))

    def _latency(self, span: Span) -> float:
        return self.nvlink_latency + self.network_latency * max(0, span.nodes - 1).bit_length()

    def _bandwidth(self, kind: str, span: Span) -> float:
        """Bytes/s that a rank sends at.

        Within a node NVLink. Across nodes a ring's traffic leaves a node by the adapters of all its members, so it is
        as fast as these together, or as NVLink; in an all-to-all each rank sends on its own adapter what is for other
        nodes; a shift waits for the rank whose neighbour is on another node.
        """
        nvlink, network = self.nvlink * self.efficiency.nvlink, self.network * self.efficiency.network
        if span.nodes == 1:
            return nvlink
        if kind == "shift_ranks":
            return network
        if kind in ("all_to_all", "exchange_rows"):
            away = (span.ranks - span.on_a_node) / max(1, span.ranks - 1)
            return 1 / max(away / network, (1 - away) / nvlink)
        return min(nvlink, network * span.on_a_node)


@functools.lru_cache(maxsize=1 << 12)
def _span(mesh: Mesh, axes: tuple[str, ...], gpus_per_node: int) -> Span:
    spans = []
    for members in mesh.members(*axes):
        nodes = [rank // gpus_per_node for rank in members]
        spans.append(Span(len(members), len(set(nodes)), max(map(nodes.count, set(nodes)))))
    return max(spans, key=lambda span: (span.nodes, -span.on_a_node))


def a100() -> Cluster:
    """DGX A100 80GB: NVIDIA A100 data sheet (312 TFLOP/s bf16, 19.5 fp32, 2,039 GB/s, NVLink 600 GB/s both ways), and
    eight 200 Gb/s HDR adapters (DGX A100 data sheet).
    """
    return _node("a100", bf16=312e12, fp32=19.5e12, memory=79.2 * GIB, hbm=2.039e12, nvlink=300e9, network=25e9)


def h100() -> Cluster:
    """DGX H100: NVIDIA H100 SXM data sheet (989.4 TFLOP/s bf16 dense, 67 fp32, 3.35 TB/s, NVLink 900 GB/s both ways),
    and eight 400 Gb/s NDR adapters (DGX H100 data sheet).
    """
    return _node("h100", bf16=989.4e12, fp32=67e12, memory=79.2 * GIB, hbm=3.35e12, nvlink=450e9, network=50e9)


def h200() -> Cluster:
    """HGX H200: NVIDIA H200 SXM data sheet (compute and links of the H100, 141 GB at 4.8 TB/s)."""
    return _node("h200", bf16=989.4e12, fp32=67e12, memory=139.8 * GIB, hbm=4.8e12, nvlink=450e9, network=50e9)


def b200() -> Cluster:
    """DGX B200: data sheet of the system (144 PFLOP/s fp4 and 72 fp8, both sparse, of 8 GPUs: 2,250 TFLOP/s bf16 dense
    each; 1,440 GB at 64 TB/s in all; NVLink 14.4 TB/s in all, both ways; 400 Gb/s adapters).
    """
    return _node("b200", bf16=2250e12, fp32=75e12, memory=178.3 * GIB, hbm=8e12, nvlink=900e9, network=50e9)


def _node(name: str, *, bf16: float, fp32: float, memory: float, hbm: float, nvlink: float, network: float) -> Cluster:
    flops = {torch.bfloat16: bf16, torch.float16: bf16, torch.float32: fp32, torch.float64: fp32 / 2}
    return Cluster(name, 8, flops, memory - GIB, hbm, nvlink, network)  # a GiB for the context and NCCL's buffers


CLUSTERS = {"a100": a100, "h100": h100, "h200": h200, "b200": b200}


def cluster(name: str) -> Cluster:
    """A cluster by the name of its GPU: "a100", "h100", "h200" or "b200"."""
    if name not in CLUSTERS:
        near = difflib.get_close_matches(name, CLUSTERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no cluster is called {name!r}; nearest: {near!r}; known: {', '.join(CLUSTERS)}")
    return CLUSTERS[name]()
