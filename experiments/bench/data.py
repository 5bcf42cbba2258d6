"""How full and how alike packs are, how fast texts become batches, and whether memory stays flat.

    python -m experiments.bench.data [--json FILE] [--rounds 3]

Packing is computed, on one stream of lengths, beside first fit; packs with media beside those of which encoders are
not looked at. Speed is of alternating rounds, medians; ratios are
taken within a round, since other work on the machine changes it from one to the next.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.bench import data_packing, data_speed, media_packing
from experiments.bench.table import Row, publish, row
from ftrain.data.cost import Cost
from ftrain.data.packing import Packing

_WIDTH = 4096  # of the model whose attention makes long documents dear
_CPU = "; CPU time of all processes, since two cores that all of them fill give as many tokens as it allows"
_WALL = "; told without a goal: it is also that of others on a shared machine"
_MARKS = (10_000, 100_000)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    json: Path | None = None
    """Where the rows go as JSON."""
    ranks: int = 64
    """Simulated data ranks."""
    tokens: int = 8192
    """Budget of a pack."""
    steps: int = 100
    """Simulated steps."""
    rounds: int = 3
    """Rounds of speed that count; one before them does not."""
    speed_tokens: int = 2_000_000
    """Tokens of each side of a round."""
    tokenizer: Path | None = None
    """A tokenizer.json; default: one made of Python's documentation."""
    media_tokens: int = 32_768
    """Budget of a pack with films and pictures."""
    media_steps: int = 30
    """Simulated steps of these."""
    parts: tuple[str, ...] = ("packing", "media", "speed", "memory")
    """Which of packing, media, speed and memory."""


def main(options: Options) -> int:
    """Print the table; 1 if a goal is missed."""
    of_parts = {"packing": packing_rows, "media": media_rows, "speed": speed_rows, "memory": memory_rows}
    unknown = [part for part in options.parts if part not in of_parts]
    if unknown:
        raise SystemExit(f"--parts {unknown[0]}: it is none of {', '.join(of_parts)}")
    rows = [found for part in options.parts for found in of_parts[part](options)]
    publish(rows, "data", options.json)
    return int(any(r.ok is False for r in rows))


def packing_rows(options: Options) -> list[Row]:
    """Padding, cost over ranks and speed of the plan; with several micro-batches a step has as many packs more."""
    rows: list[Row] = []
    for micro_batches in (1, 4):
        packing = Packing(options.tokens, ranks=options.ranks, micro_batches=micro_batches, cost=Cost.of_width(_WIDTH))
        steps = max(10, options.steps // micro_batches)
        stream = data_packing.lengths((steps + 8) * packing.packs * options.tokens // 400, options.tokens)
        our, theirs = (
            data_packing.measured(stream, kind(packing), steps=steps, tokens=options.tokens)
            for kind in (data_packing.ours, data_packing.first_fit)
        )
        what = f"{micro_batches} pack{'s' if micro_batches > 1 else ''} a rank"
        how = (
            f"{steps} steps over {options.ranks} simulated ranks, packs of {options.tokens} tokens, log-normal chats "
            f"and a tail up to a pack; cost of a decoder of width {_WIDTH}; peer: first fit over 200 documents a rank, "
            "as VeOmni's"
        )
        waited = "; what ranks wait for the slowest, over the mean, all steps together"
        rows += [
            row(f"{what}: padding of the budget", 100 * our.padding, "%", goal=1.5, peer=100 * theirs.padding, how=how),
            row(f"{what}: cost of the slowest rank above the mean", 100 * our.imbalance, "%", goal=3.0,
                peer=100 * theirs.imbalance, how=how + waited),
            row(f"{what}: the same, worst step", 100 * our.worst, "%", peer=100 * theirs.worst, how=how),
            row(f"{what}: CPU time of the plan, a document", 1e6 * our.seconds, "µs", goal=10.0,
                peer=1e6 * theirs.seconds, how=how),
        ]  # fmt: skip
    return rows


def media_rows(options: Options) -> list[Row]:
    """What ranks wait for each other in encoders and in the decoder, of a video-heavy mixture."""
    packing = Packing(options.media_tokens, ranks=options.ranks)
    ours, other = (media_packing.measured(packing, steps=options.media_steps, even=even) for even in (True, False))
    how = (
        f"{options.media_steps} steps over {options.ranks} simulated ranks, packs of {options.media_tokens} tokens, "
        f"half of the documents with a film, a quarter with pictures; FLOPs of {media_packing.MODEL} by formula; peer: "
        "packs of which only the decoder is made even"
    )
    waited = "; what ranks wait for the slowest, over the mean, all steps together"
    return [
        row("media: encoders' cost of the slowest rank above the mean", 100 * ours.encoder, "%", goal=5.0,
            peer=100 * other.encoder, how=how + waited),
        row("media: the decoder's", 100 * ours.decoder, "%", goal=5.0, peer=100 * other.decoder, how=how + waited),
        row("media: encoders', worst step", 100 * ours.worst_encoder, "%", peer=100 * other.worst_encoder, how=how),
        row("media: the decoder's, worst step", 100 * ours.worst_decoder, "%", peer=100 * other.worst_decoder, how=how),
        row("media: padding of the budget", 100 * ours.padding, "%", goal=1.5, peer=100 * other.padding, how=how),
        row("media: CPU time of the plan, a step", 1e3 * ours.seconds, "ms", peer=1e3 * other.seconds, how=how),
    ]  # fmt: skip


Side = Callable[[list[str], data_speed.Encode, int], Generator[int]]


def speed_rows(options: Options) -> list[Row]:
    """The loader beside torch's DataLoader and beside tokenising alone."""
    texts = data_speed.make_texts(4000, options.tokens)
    encode = data_speed.Encode(data_speed.make_tokenizer(options.tokenizer), options.tokens)
    sides: dict[str, Side | None] = {"ours": None, "torch": data_speed.torchs, "raw": data_speed.raw}
    found: dict[str, list[data_speed.Speed]] = {name: [] for name in sides}
    ours = data_speed.ours(texts, encode, options.tokens)  # once: its workers are started anew, those of others forked
    for number in range(options.rounds + 1):
        for name, side in sides.items():
            others = () if side is None else data_speed.processes()[1:]
            batches = ours if side is None else side(texts, encode, options.tokens)
            first = 30 * options.tokens
            speed = data_speed.speed_of(batches, first=first, tokens=options.speed_tokens, others=others)
            if number:
                found[name].append(speed)
            if batches is not ours:
                batches.close()
    ours.close()
    how = (
        f"texts tokenised, packed to {options.tokens} tokens and laid out, {data_speed.WORKERS} worker processes, "
        f"{options.speed_tokens} tokens a side, medians of {options.rounds} alternating rounds"
    )

    def per_second(name: str) -> str:
        return f"{statistics.median(one.per_second for one in found[name]) / 1e6:.2f} M tokens/s"

    def ratios(name: str, other: str, goal: float, note: str) -> list[Row]:
        pairs = list(zip(found["ours"], found[other], strict=True))
        cpu = statistics.median(our.cpu / their.cpu for our, their in pairs)
        wall = statistics.median(their.per_second / our.per_second for our, their in pairs)
        theirs = statistics.median(one.cpu for one in found[other])
        return [
            row(f"{name}, CPU time", cpu, "x", goal=goal, peer=f"{theirs * 1e6:.2f} µs a token", how=how + note + _CPU),
            row(f"{name}, wall clock", wall, "x", peer=per_second(other), how=how + note + _WALL),
        ]

    ours_cpu = statistics.median(one.cpu for one in found["ours"])
    return [
        row("loader: CPU time of a token", ours_cpu * 1e6, "µs", peer=per_second("ours"), how=how),
        *ratios("loader over torch's DataLoader", "torch", 1 / 1.2, "; its samples are packed first fit in the main "
                "process, as VeOmni's"),
        *ratios("loader over tokenising alone", "raw", 1 / 0.9, "; peer: two processes that only tokenise"),
    ]  # fmt: skip


def memory_rows(options: Options) -> list[Row]:
    """Resident memory of the loader and its worker, early and late."""
    command = [sys.executable, "-m", "experiments.bench.data_memory", *map(str, _MARKS)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    early, late = (int(line.split()[1]) / 2**20 for line in printed.splitlines() if line)
    how = "resident memory of a loader and one worker process, of their own"
    return [
        row(f"memory after {_MARKS[0]} samples", early, "MiB", how=how),
        row(f"memory after {_MARKS[1]} samples, over that after {_MARKS[0]}", late / early, "x", goal=1.02,
            peer=f"{late:.0f} MiB", how=how),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
