"""Kill -9 a training process at random moments of its saves; every time the latest named step must restore to the bit.

    python -m experiments.bench.crash --kills 1000 --json crash.json

With `--ranks 2` or more, processes that save together: one of them or all are killed (`crash_ranks.py`).

A child resumes, then saves one step after another, each state computed from the number of its step. The parent kills it
at a random moment, restores the latest step and compares. Without a device's power cut the page cache survives: this
tests the death of processes; that data reaches the disk before its name does is the order of the syncs (write.py).
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from experiments.bench.crash_ranks import run_rank_kills
from experiments.bench.crash_state import Crash, state_of, verified_step
from ftrain.checkpoint import Checkpointer, Retention, Storage, latest
from ftrain.checkpoint.folders import leftovers


def save_for_ever(root: str, mib: float, database: bool, pipe: Connection) -> None:
    """The child: resume, say from where, and save one step after another until killed, telling when each begins."""
    torch.set_num_threads(1)
    keep = Retention(last=2, every=50)
    with Checkpointer(root, keep=keep, storage=Storage(database=database, chunk_bytes=2**20)) as checkpoints:
        step = checkpoints.latest() or 0
        pipe.send(step)
        while True:
            step += 1
            state = state_of(step, mib)
            checkpoints.wait()
            pipe.send(step)
            checkpoints.save(state, step)


def run_kills(config: Crash, root: Path) -> Iterator[str]:
    """Kill `config.kills` children, one after another; yields what each kill hit: "between saves", "while writing".

    Raises:
        RuntimeError: a kill lost the latest step, or left it with other bits, or a child ended by itself.
    """
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["torch", "tyro", "ftrain.checkpoint"])
    moments = random.Random(config.seed)
    reached = 0
    for kill in range(config.kills):
        hear, tell = spawn.Pipe(duplex=False)
        child = spawn.Process(target=save_for_ever, args=(str(root), config.mib, config.database, tell))
        child.start()
        tell.close()
        try:
            resumed = hear.recv()
            wait_for_the_moment(hear, moments)
        except EOFError:
            child.join()
            raise RuntimeError(f"kill {kill}: the child ended by itself with code {child.exitcode}") from None
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        if resumed != reached:
            raise RuntimeError(f"kill {kill}: the child resumed from step {resumed}, and {reached} was the latest")
        hit = "while writing" if leftovers(root) else "between saves"
        reached = verified_step(root, reached, config.mib)
        yield hit


def wait_for_the_moment(hear: Connection, moments: random.Random) -> None:
    """Let the child begin two to four saves; return at a random moment of the last, or shortly after it."""
    hear.recv()
    begun = time.perf_counter()
    more = moments.randint(1, 3)
    for _ in range(more):
        hear.recv()
    typical = (time.perf_counter() - begun) / more
    time.sleep(moments.uniform(0.0, 1.1 * typical))


def main(config: Crash) -> None:
    """Run, print, and write the row in the format of all benches."""
    root = Path(tempfile.mkdtemp(prefix="crash-"))
    begin = time.perf_counter()
    hits: Counter[tuple[str, str]] = Counter()
    alone = config.ranks == 1
    try:
        for hit in (("the process", h) for h in run_kills(config, root)) if alone else run_rank_kills(config, root):
            hits[hit] += 1
        last = latest(root)
    finally:
        shutil.rmtree(root)
    writing = sum(n for (_, moment), n in hits.items() if moment == "while writing")
    row = {
        "name": "kill -9 survived to the bit" + ("" if alone else f", {config.ranks} ranks"),
        "value": hits.total(),
        "unit": "kills",
        "goal": config.kills,
        "ok": hits.total() == config.kills and writing > 0,
        "peer": None,
        "how": f"{writing} while writing, the last step is {last}, {time.perf_counter() - begin:.0f} s, "
        f"{config.mib} MiB of state; {_words(hits)}",
    }
    _print(hits, f"{row['name']}: {row['value']} of {row['goal']}, the last step is {last}")
    if config.json is not None:
        config.json.write_text(json.dumps([row], indent=1))


def _words(hits: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{kind}: {n} {moment}" for (kind, moment), n in sorted(hits.items()))


def _print(hits: Counter[tuple[str, str]], title: str) -> None:
    table = Table("killed", "while writing", "between saves", title=title, title_justify="left")
    for kind in sorted({kind for kind, _ in hits}):
        table.add_row(kind, str(hits[kind, "while writing"]), str(hits[kind, "between saves"]))
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Crash))
