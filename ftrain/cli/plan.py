"""`ftrain plan EXPERIMENT`: search the layouts of an experiment's step, print them, write the best as a plan."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from ftrain.analysis.cluster import Cluster, cluster
from ftrain.analysis.op_times import read_times
from ftrain.plan.check import check_best, processes
from ftrain.plan.file import PlanFile
from ftrain.plan.local_machine import from_rank_zero, is_first
from ftrain.plan.page import write_page
from ftrain.plan.search import Options, Result, search
from ftrain.plan.space import Space, divisors
from ftrain.plan.table import print_result
from ftrain.plan.workload import Workload

FUNCTION = "plan_for_search"
_TOKENS = 32 * 1024  # tokens per GPU and step, by default
_UNITS = {"": 1, "K": 1024, "M": 1024**2}


@dataclass(frozen=True)
class PlanOptions:
    """Search the layouts of an experiment's step on a cluster; no GPU is needed."""

    experiment: tyro.conf.Positional[Path]
    """A Python file with a function plan_for_search(tokens=..., packs=...)."""
    gpus: int = 8
    """How many GPUs there are."""
    gpu: str = "h100"
    """a100, h100, h200 or b200."""
    op_times: Path | None = None
    """Microseconds of single ops on such a GPU: the op-times-*.json that experiments/bench/gpu.py leaves. Ops that are
    not in it are priced by a roofline."""
    tokens: str = "8K"
    """Tokens of a pack: the longest document. K and M are 1024 and 1024^2."""
    packs: int | None = None
    """Packs in a step, over all GPUs; default: one per GPU, fewer where packs are longer than 32K tokens."""
    size: str | None = None
    """Size of the model, where the experiment has several: the argument of its plan_for_search(size=...)."""
    traced: int = 24
    """How many of the most promising layouts are traced and priced exactly."""
    seconds: float = 150.0
    """Seconds after which no more layouts are traced."""
    processes: int = 2
    """Processes that trace."""
    remat: tuple[str, ...] = field(default=("none", "4", "100"))
    """What is recomputed: none, layer, or microseconds per MB."""
    rings: bool = True
    """Also try ring attention and hybrids."""
    html: Path | None = None
    """Write an HTML page with the Pareto front to this file."""
    apply: Path | None = None
    """Write the best layout as a plan to this file."""
    check: int = 0
    """Run this many of the best layouts on the devices of this machine, and compare with the prediction."""


def run(options: PlanOptions) -> int:
    """The command; 1 if no layout fits, 0 with `--traced 0`, which estimates alone. With `--check` under torchrun one
    rank searches, prints and writes. ValueError for options that do not fit, and where no layout is legal.
    """
    with processes() if options.check else nullcontext():
        return _run(options)


def _nothing_priced(result: Result, options: PlanOptions, console: Console) -> int:
    if not result.untraced:
        console.print("no layout fits: take fewer --packs or --tokens, or more GPUs")
    elif options.traced:
        console.print("none of the layouts that were traced fits: take fewer --packs or --tokens, or a larger --traced")
    else:
        console.print("no layout was traced: --traced 1 prices the most promising one")
    wanted = options.apply is not None or options.check > 0
    return 1 if options.traced or wanted or not result.untraced else 0


def _run(options: PlanOptions) -> int:
    console = Console(width=None if sys.stdout.isatty() else 160, quiet=not is_first())
    tokens = tokens_of(options.tokens)
    packs = options.packs or default_packs(options.gpus, tokens)
    load = partial(load_workload, options.experiment, tokens, packs, options.size)
    workload, machine = load(), _machine(options)
    say = partial(console.print, style="dim")
    result = from_rank_zero(lambda: search(workload, options.gpus, machine, _options_of(options), load=load, say=say))
    title = f"{workload.name}: {packs} packs of {tokens} tokens a step on {options.gpus} x {machine.name}"
    print_result(result, title=title, console=console)
    if options.html is not None and is_first():
        console.print(f"wrote {write_page(result, options.html, title=title, cluster=machine)}")
    if not result.prices:
        return _nothing_priced(result, options, console)
    if options.apply is not None and is_first():
        best = PlanFile.of(result.prices[0], workload, machine)
        console.print(f"wrote {best.save(options.apply)}: {best.candidate}")
    if options.check:
        check_best(result.prices[: options.check], workload, console=console)
    return 0


def _machine(options: PlanOptions) -> Cluster:
    known = cluster(options.gpu)
    return known if options.op_times is None else replace(known, measured=read_times(options.op_times))


def _options_of(options: PlanOptions) -> Options:
    space = Space(remats=tuple(_remat(text) for text in options.remat), rings=options.rings)
    return Options(traced=options.traced, processes=options.processes, space=space, seconds=options.seconds)


def default_packs(gpus: int, tokens: int) -> int:
    """The most packs that divide evenly among `gpus` GPUs and give each at most 32K tokens; at least one. `tokens`: of
    a pack.

    >>> from ftrain.cli.plan import default_packs
    >>> default_packs(8, 8 * 1024), default_packs(8, 64 * 1024)
    (8, 4)
    """
    return max((n for n in divisors(gpus) if n * tokens <= gpus * _TOKENS), default=1)


def load_workload(file: Path, tokens: int, packs: int, size: str | None = None) -> Workload:
    """The `Workload` that the experiment in `file` offers to a search, for packs of `tokens` tokens, `packs` of them in
    a step.

    `size`: of the model, where the experiment has several. ValueError if there is no such file, if it has no
    `plan_for_search`, or if that takes no `size` and one is given.
    """
    file = Path(file).resolve()
    if not file.exists():
        raise ValueError(f"{file}: there is no such experiment")
    make = getattr(_module(file), FUNCTION, None)
    if make is None:
        raise ValueError(
            f"{file} has no function {FUNCTION}(*, tokens, packs): it returns a ftrain.plan.workload.Workload"
        )
    found: Callable[..., Any] = make
    if size is None:
        return found(tokens=tokens, packs=packs)
    if "size" not in inspect.signature(found).parameters:
        raise ValueError(f"--size {size}: {FUNCTION} of {file} takes no size; leave --size out")
    return found(tokens=tokens, packs=packs, size=size)


def tokens_of(text: str) -> int:
    """A number of tokens, with an optional K or M for 1024 and 1024^2. ValueError for another text.

    >>> from ftrain.cli.plan import tokens_of
    >>> tokens_of("160K")
    163840
    """
    found = re.fullmatch(r"(\d+)([KM]?)", text.strip().upper())
    if found is None:
        raise ValueError(f"--tokens {text!r}: give a number, with K or M for 1024 and 1024^2")
    return int(found.group(1)) * _UNITS[found.group(2)]


def _remat(text: str) -> str | float:
    if text in ("none", "layer"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--remat {text!r}: give none, layer, or microseconds per MB") from None


def _module(file: Path) -> Any:
    """The experiment as a module, by its import name: within its package, if its folder is one."""
    parts = [file.stem]
    folder = file.parent
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    name = ".".join(parts)
    if name not in sys.modules and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


COMMANDS = {"plan": (PlanOptions, run)}
