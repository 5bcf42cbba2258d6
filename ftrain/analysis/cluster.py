"""Clusters of GPUs: their compute, memory and links, and how long a collective over axes of a mesh takes on them.

A collective takes `latency + bytes / bandwidth` (the alpha-beta model). Its links follow from the places of its ranks:
rank i is GPU `i % gpus_per_node` of node `i // gpus_per_node`. A group inside one node uses NVLink, a group across
nodes uses the network.

Peak figures come from the vendors' data sheets. `Efficiency` holds the share of each peak that a step reaches.
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
    """The shares of the peak figures that a step reaches, and its overheads in time and memory.

    - `matmul`, `attention`, `grouped`: shares of the peak FLOP/s, in (0, 1], of dense products, of attention kernels
      and of grouped products (experts).
    - `bandwidth`, `nvlink`, `network`: shares of the peak bytes/s, in (0, 1], of memory and of the two links.
    - `launch`: microseconds that a kernel takes beyond its work.
    - `fragmentation`: bytes that the allocator reserves for each byte in use at the peak; at least 1.
    - `compute_while_sending`: factor, at least 1, by which compute is slower while a message is under way, because
      collectives take SMs and memory bandwidth.

    `matmul` and `network` are fitted on two published rows (see experiments/bench/plan_vs_published.py) of programs
    whose ops no compiler fuses. The others are commonly measured values: FlashAttention-2 reaches 35-40 % of an H100's
    peak forward and backward (Shah et al. 2024, figure 5), and nccl-tests reach about 80 % of NVLink's data sheet for
    large messages. ValueError for a share outside of (0, 1] and for a factor below 1.

    >>> from ftrain.analysis.cluster import Efficiency
    >>> Efficiency(matmul=1.2)
    Traceback (most recent call last):
    ValueError: Efficiency(matmul=1.2): a share of the peak is in (0, 1]
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
    """Where the ranks of a group are: their number, the number of nodes they are on, and the most ranks on one node."""

    ranks: int
    nodes: int
    on_a_node: int


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    - `gpus_per_node`: GPUs of one node.
    - `flops`: dense peak FLOP/s of one GPU, by dtype.
    - `memory`: bytes of a GPU that a process can use. `memory_bandwidth`: bytes/s.
    - `nvlink`, `network`: bytes/s that one GPU sends in one direction, within its node and to other nodes.
    - `nvlink_latency`: microseconds of a collective within a node. `network_latency`: microseconds added for each
      doubling of the number of nodes.
    - `efficiency`: the shares of these peaks that a step reaches.
    - `device_type`: "cuda" or "cpu"; it selects the kernels whose workspaces count.
    - `measured`: microseconds of single ops by `ftrain.analysis.op_times.op_key`; they replace the roofline.
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
        """Peak FLOP/s in bfloat16, the denominator of MFU."""
        return self.flops[torch.bfloat16]

    def span(self, mesh: Mesh, axes: tuple[str, ...]) -> Span:
        """Where the ranks of a group over `axes` are. Of several such groups, that of the group over most nodes."""
        return _span(mesh, axes, self.gpus_per_node)

    def microseconds(self, kind: str, sent: float, mesh: Mesh, axes: tuple[str, ...]) -> float:
        """Microseconds of a collective over `axes` in which each rank sends `sent` bytes.

        `kind`: the collective, one of those of `ftrain.sharding.link`, e.g. "all_gather".
        """
        span = self.span(mesh, axes)
        return self._latency(span) + 1e6 * sent / self._bandwidth(kind, span)

    def link(self, mesh: Mesh, axes: tuple[str, ...] = ("shard", "sequence")) -> Link:
        """Latency and bandwidth of a gather over `axes`. The passes bucket and overlap read them."""
        span = self.span(mesh, axes)
        return Link(self._latency(span), self._bandwidth("all_gather", span))

    def speed(self) -> Speed:
        """The speed of one GPU, in the form that `OpTimes` reads."""
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
        """The same cluster with some fields of its `Efficiency` replaced, given by name.

        ValueError for a value out of range, TypeError for a name that `Efficiency` does not have.
        """
        return replace(self, efficiency=replace(self.efficiency, **shares))

    def _latency(self, span: Span) -> float:
        return self.nvlink_latency + self.network_latency * max(0, span.nodes - 1).bit_length()

    def _bandwidth(self, kind: str, span: Span) -> float:
        """Bytes/s at which a rank sends.

        Within a node that is NVLink. Across nodes the traffic of a ring leaves a node through the adapters of all its
        members, so the ring is as fast as these together, or as NVLink if that is slower. In an all-to-all each rank
        sends through its own adapter what other nodes receive. A shift waits for the rank whose neighbour is on another
        node.
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
    """The cluster of nodes with this GPU: "a100", "h100", "h200" or "b200".

    ValueError for another name, with the nearest one.

    >>> from ftrain.analysis.cluster import cluster
    >>> from ftrain.sharding import Mesh
    >>> h100 = cluster("h100")
    >>> f"{h100.bf16 / 1e12:.0f} TFLOP/s"
    '989 TFLOP/s'
    >>> round(h100.microseconds("all_gather", 1e8, Mesh(shard=8), ("shard",)))
    290
    """
    if name not in CLUSTERS:
        near = difflib.get_close_matches(name, CLUSTERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no cluster is called {name!r}; nearest: {near!r}; known: {', '.join(CLUSTERS)}")
    return CLUSTERS[name]()
