"""Random steps, jitted with random options, against plain eager PyTorch: equal or refused, never another number.

    python -m experiments.bench.fuzz --programs 10000 --jobs 2 --log fuzz.jsonl --json fuzz.json

Program number n depends on n alone: `--seed 5000 --programs 1000` are those from 5000 on, `--replay 5123` prints one
and runs it. With `--log` every outcome is a line of a file, and seeds that are in it are not run again. Failures are
made smaller and printed as Python that runs by itself.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments.bench.fuzzing.check import FAILURES, OUTCOMES, check, one_thread
from experiments.bench.fuzzing.generate import generate
from experiments.bench.fuzzing.source import source_of
from experiments.bench.fuzzing.workers import Report, Shrinking, reports
from experiments.bench.table import Row, publish, row

_PROGRESS_S = 15.0


@dataclass(frozen=True)
class Fuzz:
    """`programs` from `seed` on, by `jobs` processes. `log`: a file of outcomes, to resume from. `json`: receives the
    rows. `shrink_s`: time to make a failure smaller. `replay`: run one seed alone, and print its program.
    """

    programs: int = 1000
    seed: int = 0
    jobs: int = 1
    log: Path | None = None
    json: Path | None = None
    shrink_s: float = 30.0
    replay: int | None = None


def main(config: Fuzz) -> None:
    """Run, print failures as they come, then counts; write the rows."""
    if config.replay is not None:
        replay(config.replay)
        return
    console, began = Console(), time.perf_counter()
    known = {r.seed: r for r in _read(config.log)}
    seeds = range(config.seed, config.seed + config.programs)
    found = [known[s] for s in seeds if s in known]
    told = time.monotonic()
    for report in reports([s for s in seeds if s not in known], jobs=config.jobs, shrinking=Shrinking(config.shrink_s)):
        found.append(report)
        _write(config.log, report)
        if report.source:
            print(f"\nseed {report.seed}: {report.kind}\n{report.source}", flush=True)
        if time.monotonic() - told > _PROGRESS_S:
            told = time.monotonic()
            console.print(_progress(found, config.programs), highlight=False)
    _print_counts(console, found)
    publish(rows(found, time.perf_counter() - began), "Random steps against eager", config.json)


def replay(seed: int) -> None:
    """Print the program of a seed, and how it comes out."""
    with one_thread():
        program = generate(seed)
        print(source_of(program, main=True))
        found = check(program)
        print(f"# {found.outcome}: {found.detail}")


def rows(found: Sequence[Report], seconds: float) -> list[Row]:
    """What is measured: failures by kind of outcome, and how much was tried."""
    counts = Counter(r.outcome for r in found)
    tried = len(found) - counts["no program"]
    how = f"{tried} random steps with random options against plain eager PyTorch in float64, to 1e-10"
    silent = row("silent differences", counts["different"], "programs", goal=0, how=how)
    crashes = row("crashes and hangs", counts["crash"], "programs", goal=0, how=how)
    raw = row("errors in other words than ours", counts["raw error"], "programs", goal=0, how=how)
    others = [row(name, counts[name], "programs", how=how) for name in ("equal", "refused", "unstable", "no program")]
    mean = 1e3 * sum(r.seconds for r in found) / max(1, len(found))
    return [silent, crashes, raw, *others, row("time of a program", mean, "ms", how=f"{how}; {seconds:.0f} s in all")]


def _progress(found: Sequence[Report], programs: int) -> str:
    counts = Counter(r.outcome for r in found)
    words = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o])
    return f"{len(found)} of {programs}: {words}"


def _print_counts(console: Console, found: Sequence[Report]) -> None:
    shown = [o for o in OUTCOMES if any(r.outcome == o for r in found)]
    by_feature = Table("feature", *shown, title="Programs by what is in them", title_justify="left")
    counts = Counter((feature, r.outcome) for r in found for feature in r.features)
    for feature in sorted({feature for feature, _ in counts}):
        by_feature.add_row(feature, *(str(counts[feature, o] or "") for o in shown))
    console.print(by_feature)
    kinds = Counter(r.kind for r in found if r.kind)
    examples = {r.kind: r.seed for r in reversed(found)}
    by_kind = Table("programs", "first seed", "what", title="What was not equal", title_justify="left")
    for kind, number in sorted(kinds.items(), key=lambda k: (k[0].split(":")[0] not in FAILURES, -k[1])):
        by_kind.add_row(str(number), str(examples[kind]), kind)
    console.print(by_kind, highlight=False)


def _read(log: Path | None) -> Iterator[Report]:
    if log is None or not log.exists():
        return
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        yield Report(**{**entry, "features": tuple(entry["features"])})


def _write(log: Path | None, report: Report) -> None:
    if log is not None:
        with log.open("a") as file:
            file.write(json.dumps(asdict(report)) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Fuzz))
