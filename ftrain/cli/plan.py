"""`ftrain plan`: search the layouts of the step of a model's folder or an experiment, print them, write the best."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from ftrain.analysis.cluster import Cluster, cluster
from ftrain.analysis.op_times import read_times
from ftrain.cli.lora_flags import LoraFlags
from ftrain.graph.text import show_bytes
from ftrain.plan.check import check_best, processes
from ftrain.plan.file import PlanFile
from ftrain.plan.local_machine import from_rank_zero, is_first
from ftrain.plan.page import write_page
from ftrain.plan.search import Options, Result, search
from ftrain.plan.space import Space, divisors
from ftrain.plan.table import print_result
from ftrain.plan.workload import Workload
from ftrain.remat.policy import parse_budget

FUNCTION = "plan_for_search"
_TOKENS = 32 * 1024  # tokens per GPU and step, by default
_OF_MODELS = ("task", "lora", "freeze", "only", "teacher", "native")
_UNITS = {"": 1, "K": 1024, "M": 1024**2}


@dataclass(frozen=True)
class PlanOptions:
    """Search the layouts of a step on a cluster; no GPU is needed. The step is that of an experiment's file, or of
    `ftrain train TASK --model DIR`, whose weights are not read."""

    experiment: tyro.conf.Positional[Path | None] = None
    """A Python file with a function plan_for_search(tokens=..., packs=...); or give --model."""
    model: Path | None = None
    """A folder in Hugging Face's format."""
    task: str = "sft"
    """Of a model's folder: what it is trained for, as in `ftrain train TASK`."""
    lora: LoraFlags = field(default_factory=LoraFlags)
    freeze: tuple[str, ...] = ()
    """Globs over paths of parameters that are not trained."""
    only: tuple[str, ...] = ()
    """Globs over paths of the parameters that alone are trained."""
    teacher: Path | None = None
    """With --task kd: the teacher's folder."""
    native: Literal["auto", "always", "never"] = "auto"
    """auto: a family of the library where it has the model's, transformers' own module elsewhere."""
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
    budget: str = "95%"
    """The most memory that a step may use of a GPU, such as 70GiB or 80%."""
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
    load = _load(options, tokens, packs)
    workload, machine = load(), _machine(options)
    say = partial(console.print, style="dim")
    how = _options_of(options, machine)
    result = from_rank_zero(lambda: search(workload, options.gpus, machine, how, load=load, say=say))
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


def _options_of(options: PlanOptions, machine: Cluster) -> Options:
    space = Space(remats=tuple(_remat(text) for text in options.remat), rings=options.rings)
    share = share_of(options.budget, machine)
    return Options(options.traced, options.processes, space, memory=share, seconds=options.seconds)


def share_of(budget: str, machine: Cluster) -> float:
    """The share of a GPU's memory that a budget is. ValueError for one of another form, or beyond the GPU.

    >>> from ftrain.analysis.cluster import cluster
    >>> from ftrain.cli.plan import share_of
    >>> share_of("80%", cluster("h100"))
    0.8
    """
    try:
        found = parse_budget(budget)
    except ValueError:
        found = "fit"
    if isinstance(found, str):
        raise ValueError(f"--budget {budget!r}: give bytes, 70GiB or 80%")
    share = found if isinstance(found, float) else found / machine.memory
    if not 0 < share <= 1:
        raise ValueError(f"--budget {budget}: a {machine.name} has {show_bytes(int(machine.memory))}")
    return share


def _load(options: PlanOptions, tokens: int, packs: int) -> Callable[[], Workload]:
    """What makes the workload, also in other processes."""
    if (options.experiment is None) == (options.model is None):
        raise ValueError("ftrain plan: give either an experiment's file, or --model DIR")
    if options.experiment is not None:
        given = [f.name for f in fields(options) if f.name in _OF_MODELS and getattr(options, f.name) != _default(f)]
        if given:
            raise ValueError(f"--{given[0]} is for --model DIR: an experiment's file says itself what it trains")
        return partial(load_workload, options.experiment, tokens, packs, options.size)
    if options.size is not None:
        raise ValueError(f"--size {options.size}: it is for an experiment's file; a folder has one size")
    from ftrain.cli.plan_model import ModelStep  # the extra `train`, which a search of experiments does not need

    assert options.model is not None
    chosen = {name: getattr(options, name) for name in _OF_MODELS}
    return ModelStep(options.model, tokens=tokens, packs=packs, **chosen).workload


def _default(field: Any) -> Any:
    return field.default_factory() if field.default is MISSING else field.default


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
