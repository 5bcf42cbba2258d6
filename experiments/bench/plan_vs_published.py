"""What the search predicts beside what others have published: memory, tokens/s and MFU, with one set of constants.

    python -m experiments.bench.plan_vs_published [--json FILE]

Each row is a published run: its model, its GPUs, its layout. Time is that of the layout lowered as ftrain would run it
and priced on paper; memory is what the published program holds where its sources tell that (`peers.py`), else what ours
would. Fitted are `Efficiency.network` on a row whose step is mostly messages and `.matmul` on one that is mostly
products; all other rows are predictions. Published programs keep and fuse other things than ours, so the goals (15 % of
throughput, 10 % of memory) also judge how alike the programs are. Models that see are priced in the layouts that a
search found (`experiments/plans/`): do they fit?
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from experiments.bench.peers import WITH_ALL_TO_ALL, Fsdp2
from experiments.bench.table import Row, publish, row
from experiments.decoder_plan import DecoderWorkload
from experiments.sight_plan import plan_for_search as seeing
from experiments.wan_plan import plan_for_search as wan
from ftrain.analysis.cluster import GIB, Cluster, cluster
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig, preset
from ftrain.plan.cost import MEMORY, Price, price
from ftrain.plan.file import load_plan
from ftrain.plan.space import Candidate
from ftrain.plan.table import summary
from ftrain.sharding import Ulysses

FITTED_ON = ("VeOmni 72B, SP8, 8K", "VeOmni 72B, SP4, 16K")
_TITAN = (
    "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md: FSDP2 eager, float32 masters, bf16 compute, whole "
    "logits, 2 sequences per GPU, selective recompute of every second product (ours: of what costs 4 us/MB); its H100s "
    "have HBM2e (2.4 TB/s) and 500 W: FLOP/s between those of the 400 W and the 700 W card; memory is our program's"
)
_VEOMNI = (
    "README of ByteDance-Seed/VeOmni, docs/assets/performance.png; the model is not labelled: a Qwen2-72B-class dense "
    "model on 80 GB cards of 989 TFLOP/s fits its MFU; assumed: 32 H100, one pack for each group of sequence ranks, a "
    "layer recomputed as a whole, several micro-batches (tasks/train_torch.py), the memory of the whole device (the "
    "table has 79.36 GiB on 80 GB cards)"
)
_MEGATRON = (
    "NVIDIA-NeMo/Megatron-Bridge examples/models/wan/performance-summary.md: pre-training, tensor parallel 2, context "
    "parallel 4, no rate of tokens and no memory; ours: 16 packs of one clip, Ulysses over 8 (there is no tensor "
    "parallelism here), float32 residual stream, what costs less than 4 us/MB recomputed"
)
_PAPER = (
    "arXiv 2508.02317: a 30B omni mixture with more than 2,800 tokens/s of one GPU, and 160K of context by FSDP, "
    "sequence and expert parallelism on 128 GPUs; the rate's length of documents and GPU are not told; ours: packs of "
    "one document of so many tokens, half of them of films, the whole model trained"
)
PLANS = Path(__file__).resolve().parents[1] / "plans"
_RATES = {"qwen3-vl-30b-a3b": 2800.0, "qwen3-omni-30b-a3b": 2800.0}
_MOST = 1e6  # us/MB: all of a layer is made again, its parameters are gathered once for the backward, as FSDP2 does


@dataclass(frozen=True)
class Options:
    """What to compare."""

    json: Path | None = None
    """Where the rows go as JSON."""
    only: str = ""
    """Only runs whose name contains this."""


@dataclass(frozen=True)
class Published:
    """A run that somebody published: `memory` in GiB and `rate` in tokens/s of one GPU."""

    name: str
    model: str
    tokens: int
    packs: int
    layout: Candidate
    memory: float
    rate: float

    @property
    def titan(self) -> bool:
        """Whether it is one of TorchTitan's; else it is VeOmni's."""
        return self.name.startswith("TorchTitan")

    @property
    def source(self) -> str:
        """Where the figures are from, and what was assumed."""
        return _TITAN if self.titan else _VEOMNI

    @property
    def cluster(self) -> Cluster:
        """The GPUs that it ran on."""
        return grand_teton() if self.titan else cluster("h100")


def grand_teton() -> Cluster:
    """H100s with 96 GB of HBM2e at 2.4 TB/s and 500 W (TorchTitan's page); FLOP/s are taken to grow with power between
    the data sheet's H100 NVL (835 TFLOP/s bf16 at 400 W) and SXM (989 at 700 W).
    """
    base = cluster("h100")
    share = (835 + (989.4 - 835) * (500 - 400) / (700 - 400)) / 989.4
    flops = {dtype: share * n for dtype, n in base.flops.items()}
    return replace(base, name="h100 500 W", flops=flops, memory=94 * GIB, memory_bandwidth=2.4e12)


def models() -> dict[str, DecoderConfig]:
    """The models of the runs."""
    llama = AttentionConfig(4096, heads=32, kv_heads=8, head_dim=128, rope_base=5e5)
    qwen = AttentionConfig(8192, heads=64, kv_heads=8, head_dim=128, bias=True, rope_base=1e6)
    return {
        "llama3-8b": DecoderConfig(128_256, 4096, layers=32, attention=llama, d_hidden=14_336),
        "qwen2-72b": DecoderConfig(152_064, 8192, layers=80, attention=qwen, d_hidden=29_568),
        "30b-a3b": preset("30b-a3b"),
    }


def runs() -> list[Published]:
    """The published runs; VeOmni's with their sequence size and tokens."""
    titan = [
        Published("TorchTitan Llama-3-8B, 8 H100, 8K", "llama3-8b", 8192, 16,
                  Candidate(1, 8, 1, 1, None, 1, 4.0), 82.4, 5762),
        Published("TorchTitan Llama-3-8B, 128 H100, 8K", "llama3-8b", 8192, 256,
                  Candidate(1, 128, 1, 1, None, 1, 4.0), 67.0, 5605),
    ]  # fmt: skip
    veomni = [
        (4, 8, 58.62, 565), (8, 8, 58.35, 330), (4, 16, 62.15, 624), (8, 16, 59.98, 532), (4, 32, 68.35, 592),
        (8, 32, 63.49, 533), (4, 64, 79.10, 468), (8, 64, 70.09, 441), (8, 128, 76.67, 303),
    ]  # fmt: skip
    return titan + [
        Published(f"VeOmni 72B, SP{s}, {k}K", "qwen2-72b", 1024 * k, _GPUS // s,
                  Candidate(1, _GPUS // s, s, 1, Ulysses(), 1, _MOST), memory, rate)
        for s, k, memory, rate in veomni
    ]  # fmt: skip


_GPUS = 32


def main(options: Options) -> int:
    """Print the table; 1 if a goal is missed."""
    chosen = [r for r in runs() if options.only in r.name]
    prices = [predict(r) for r in chosen]
    rows = [x for r, p in zip(chosen, prices, strict=True) for x in rows_of(r, p)]
    rows += order_rows(chosen, prices) + video_rows(options.only) + seeing_rows(options.only)
    publish(rows, "plan against published", options.json)
    return int(any(r.ok is False for r in rows))


def predict(run: Published) -> Price:
    """The run's layout on its GPUs, as ftrain would run it."""
    cfg, tokens, packs = models()[run.model], run.tokens, run.packs
    workload = DecoderWorkload(run.name, cfg, tokens=tokens, packs=packs, segmented=False, whole_logits=run.titan)
    return price(workload, run.layout, run.cluster)


def held(run: Published, p: Price) -> float:
    """Bytes at the peak of the published program, where its sources tell what it holds; else of ours."""
    if run.titan:
        return p.peak
    tokens = run.tokens * run.packs // run.layout.ranks
    return Fsdp2(models()[run.model], run.layout.ranks, tokens, micro_batches=True, device=WITH_ALL_TO_ALL).peak


def rows_of(run: Published, p: Price) -> list[Row]:
    """Throughput and memory of one run: the difference to what was published, as a share of it."""
    fitted = " (fitted)" if run.name in FITTED_ON else ""
    rate = abs(p.tokens_per_second / run.rate - 1)
    bytes_held = held(run, p)
    memory = abs(bytes_held / GIB / run.memory - 1)
    mfu = f"{p.mfu:.1%} MFU causal, {p.mfu_full:.1%} not"
    ours = "" if run.titan else f"; ours holds {p.peak / GIB:.1f}"
    how = run.source if run.titan else f"{run.source}; {WITH_ALL_TO_ALL.source}"
    return [
        row(f"{run.name}: throughput{fitted}", 100 * rate, "% off", goal=15, how=run.source,
            peer=f"{p.tokens_per_second:.0f} for {run.rate:.0f} tok/s, {mfu}"),
        row(f"{run.name}: memory", 100 * memory, "% off", goal=10, how=how,
            peer=f"{bytes_held / GIB:.1f} for {run.memory:.1f} GiB{ours}"),
    ]  # fmt: skip


def video_rows(only: str = "") -> list[Row]:
    """Wan's 14B: the rate beside what Megatron-Bridge publishes, and 81 frames of 720 x 1280 on 8 H200 alone.

    `only`: runs whose name contains this.
    """
    found = list[Row]()
    if only in (name := "Megatron-Bridge Wan 14B, 128 H100, 37440"):
        load = wan(tokens=37_440, packs=16)
        p = price(load, Candidate(1, 16, 8, 1, Ulysses(), 1, 4.0), cluster("h100"))
        shape = load.model_shape
        rate = 325.8e12 / (shape.weight_flops + shape.attention_flops)
        found.append(
            row(f"{name}: throughput", 100 * abs(p.tokens_per_second / rate - 1), "% off", goal=15, how=_MEGATRON,
                peer=f"{p.tokens_per_second:.0f} for {rate:.0f} tok/s, {p.mfu_full:.1%} MFU for 32.9%, "
                f"{p.peak / GIB:.1f} GiB")
        )  # fmt: skip
    if only in (name := "Wan 14B, 8 H200, 720p 81 frames"):
        p = price(wan(tokens=75_600, packs=1), Candidate(1, 1, 8, 1, Ulysses(), 1, 100.0), cluster("h200"))
        how = "ours alone: nobody has published it; one clip, Ulysses over 8, what costs less than 100 us/MB recomputed"
        peer = f"{p.seconds:.2f} s, {p.tokens_per_second:.0f} tok/s, {p.peak / GIB:.1f} GiB"
        found.append(row(f"{name}: MFU", 100 * p.mfu_full, "%", how=how, peer=peer))
    return found


def seeing_rows(only: str = "") -> list[Row]:
    """Models that see, on 128 H100 in the layouts that a search found: the memory of a GPU, and the rate.

    `only`: runs whose name contains this.
    """
    found = list[Row]()
    for file in sorted(PLANS.glob("*.json")):
        plan = load_plan(file)
        name = f"{plan.workload}, {plan.candidate.ranks} H100, {plan.tokens // 1024}K"
        if only in name:
            load, card = seeing(tokens=plan.tokens, packs=plan.packs, size=plan.workload), cluster(plan.cluster)
            p = price(load, plan.candidate, card)
            how, rate = f"{_PAPER}; {summary(p)}", _RATES.get(plan.workload)
            attends, others = load.model_shape.attention_flops / 2, load.model_shape.weight_flops
            told = (
                f"{p.mfu:.1%} MFU causal, {p.mfu_full:.1%} not; attention is {attends / (attends + others):.0%} of the "
                f"FLOPs, with which no card of this kind does more than {card.bf16 / (attends + others):.0f}"
            )
            found += [
                row(f"{name}: memory", p.peak / GIB, "GiB", goal=MEMORY * card.memory / GIB, how=how),
                row(f"{name}: tokens/s of a GPU", p.tokens_per_second, "1/s", how=how,
                    peer=f"{told}; published {rate:.0f}, of unknown length" if rate else told),
            ]  # fmt: skip
    return found


def order_rows(chosen: list[Published], prices: list[Price]) -> list[Row]:
    """How many pairs of VeOmni's runs are in another order of throughput than published."""
    ours = [(r, p) for r, p in zip(chosen, prices, strict=True) if r.name.startswith("VeOmni")]
    pairs = [(a, b) for i, a in enumerate(ours) for b in ours[i + 1 :]]
    wrong = [
        f"{a[0].name} and {b[0].name}"
        for a, b in pairs
        if (a[0].rate - b[0].rate) * (a[1].tokens_per_second - b[1].tokens_per_second) <= 0
    ]
    how = f"of {len(pairs)} pairs; in another order: {', '.join(wrong) or 'none'}"
    return [row("VeOmni: pairs in another order", len(wrong), "pairs", goal=0, how=how)] if pairs else []


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
