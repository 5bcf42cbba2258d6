"""What the search predicts beside what others have published: memory, tokens/s and MFU, with one set of constants.

    python experiments/bench/plan_vs_published.py [--json FILE]

Each row is a published run: its model, its GPUs, its layout. It is lowered as ftrain would run it and priced on paper.
Fitted are `Efficiency.matmul` and `.fragmentation` on the first row and `.network` on another, whose step is mostly
messages; all other rows are predictions. Published programs are not ours: they keep and fuse other things, so the goals
(15 % of throughput, 10 % of memory) also judge how alike the programs are.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.bench.table import Row, print_table, row, write_json
from experiments.decoder_plan import DecoderSubject
from ftrain.search.cluster import GIB, cluster
from ftrain.search.layouts import Candidate
from ftrain.search.price import Price, price
from modules.attention import AttentionConfig
from modules.decoder import DecoderConfig, preset
from sharding import Ulysses

FITTED_ON = ("TorchTitan Llama-3-8B, 8 H100, 8K", "VeOmni 72B, SP8, 8K")
_SOURCES = {
    "TorchTitan": "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md: FSDP2 eager, float32 masters, "
    "bf16 compute, whole logits, 2 sequences per GPU, selective recompute of every second product (ours: of what costs "
    "4 us/MB)",
    "VeOmni": "README of ByteDance-Seed/VeOmni, docs/assets/performance.png; the model is not labelled: a "
    "Qwen2-72B-class dense model on 80 GB cards of 989 TFLOP/s fits its MFU; assumed: 32 H100, one pack for each group "
    "of sequence ranks, recompute per layer",
}


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
    def source(self) -> str:
        """Where the figures are from, and what was assumed."""
        return next(text for who, text in _SOURCES.items() if self.name.startswith(who))


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
        Published(FITTED_ON[0], "llama3-8b", 8192, 16, Candidate(1, 8, 1, 1, None, 1, 4.0), 82.4, 5762),
        Published("TorchTitan Llama-3-8B, 128 H100, 8K", "llama3-8b", 8192, 256,
                  Candidate(1, 128, 1, 1, None, 1, 4.0), 67.0, 5605),
    ]  # fmt: skip
    veomni = [
        (4, 8, 58.62, 565), (8, 8, 58.35, 330), (4, 16, 62.15, 624), (8, 16, 59.98, 532), (4, 32, 68.35, 592),
        (8, 32, 63.49, 533), (4, 64, 79.10, 468), (8, 64, 70.09, 441), (8, 128, 76.67, 303),
    ]  # fmt: skip
    return titan + [
        Published(f"VeOmni 72B, SP{s}, {k}K", "qwen2-72b", 1024 * k, _GPUS // s,
                  Candidate(1, _GPUS // s, s, 1, Ulysses(), 1, "layer"), memory, rate)
        for s, k, memory, rate in veomni
    ]  # fmt: skip


_GPUS = 32


def main(options: Options) -> int:
    """Print the table; 1 if a goal is missed."""
    chosen = [r for r in runs() if options.only in r.name]
    prices = [predict(r) for r in chosen]
    rows = [x for r, p in zip(chosen, prices, strict=True) for x in rows_of(r, p)]
    rows += order_rows(chosen, prices)
    print_table(rows, "plan against published")
    if options.json is not None:
        write_json(rows, options.json)
    return int(any(r.ok is False for r in rows))


def predict(run: Published) -> Price:
    """The run's layout on its GPUs."""
    plain = run.name.startswith("TorchTitan")
    subject = DecoderSubject(
        run.name, models()[run.model], tokens=run.tokens, packs=run.packs, segmented=False, whole_logits=plain
    )
    return price(subject, run.layout, cluster("h100"))


def rows_of(run: Published, p: Price) -> list[Row]:
    """Throughput and memory of one run: the difference to what was published, as a share of it."""
    fitted = " (fitted)" if run.name in FITTED_ON else ""
    rate = abs(p.tokens_per_second / run.rate - 1)
    memory = abs(p.peak / GIB / run.memory - 1)
    mfu = f"{p.mfu:.1%} MFU causal, {p.mfu_full:.1%} not"
    return [
        row(f"{run.name}: throughput{fitted}", 100 * rate, "% off", goal=15, how=run.source,
            peer=f"{p.tokens_per_second:.0f} for {run.rate:.0f} tok/s, {mfu}"),
        row(f"{run.name}: memory{fitted}", 100 * memory, "% off", goal=10, how=run.source,
            peer=f"{p.peak / GIB:.1f} for {run.memory:.1f} GiB"),
    ]  # fmt: skip


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
