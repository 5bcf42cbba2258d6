"""Recompute by return on investment: step time against peak memory, beside per-layer checkpointing and torch's own.

    python -m experiments.bench.remat [--json FILE] [--figure FILE]

For each model, in one run, alternating, medians: nothing recomputed; each layer (`remat="layer"`); budgets of memory
(`Remat(budget=...)`) by times measured on this machine; for the language model also torch's partitioner
(`activation_memory_budget`) on the same function. Peaks are measured by the allocator, arguments not counted.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import ftrain
from experiments.bench.machine import device_title
from experiments.bench.remat_models import Case, Llama, llama, makers_on
from experiments.bench.table import Row, publish, row
from ftrain import Precision, Remat
from ftrain.analysis.liveness import input_bytes
from ftrain.analysis.meter import measure_peak
from ftrain.remat.fit import ImpossibleBudget
from ftrain.trace.precision import Choice, precision_on

TORCH_BUDGETS = (0.8, 0.5, 0.2)
SHARES = (0.8, 0.6, 0.45, 0.35)

Part = Literal["llama", "omni", "dit", "planning"]


@dataclass(frozen=True)
class Options:
    """What to measure."""

    json: Path | None = None
    """Where the rows go as JSON."""
    figure: Path | None = None
    """Where the curves go as a PNG."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the steps run; on CUDA the models are larger."""
    precision: Choice = "auto"
    """In which dtype they compute over float32 weights; auto: bfloat16 on CUDA, float32 on a CPU."""
    rounds: int = 3
    """Measured steps of each variant, alternating; more where steps are short, to 3 s for each."""
    only: tuple[Part, ...] = ("llama", "omni", "dit", "planning")
    """Which parts to run."""


@dataclass
class Point:
    """One variant: its measured peak in bytes, and seconds of its steps."""

    name: str
    call: Callable[[], Any]
    peak: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def time(self) -> float:
        """The median step."""
        return statistics.median(self.seconds)


def main(options: Options) -> int:
    """Print the table; 1 if a goal is missed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(options.device)
    precision = precision_on(device, options.precision)
    makers = makers_on(device, precision)
    rows: list[Row] = []
    curves: dict[str, list[Point]] = {}
    for part in options.only:
        if part == "planning":
            rows.append(planning_row())
            continue
        with own_times():
            case = makers[part]()
            points = measured(case, options.rounds, precision)
        rows += rows_of(case.name, points)
        curves[case.name] = list(points.values())
    publish(rows, f"remat, {device_title(options.device)}, {precision.compute}", options.json)
    if options.figure is not None:
        draw(curves, options.figure)
    return int(any(r.ok is False for r in rows))


@contextmanager
def own_times() -> Iterator[None]:
    """Times of ops measured within the block are for it alone."""
    before = os.environ.get("FTRAIN_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FTRAIN_CACHE"] = folder
        yield
    os.environ.pop("FTRAIN_CACHE")
    if before is not None:
        os.environ["FTRAIN_CACHE"] = before


def measured(case: Case, rounds: int, precision: Precision) -> dict[str, Point]:
    """All variants of a model: peaks first, since budgets follow from them, then times."""
    plain = ftrain.jit(case.step, donate=case.donate, precision=precision)
    ftrain.profile_nodes(plain, *case.args, remember=True)
    arguments = input_bytes(plain.lower(*case.args).graph)
    points = {name: _point(case, name, Remat(name), precision) for name in ("none", "layer")}
    none, layer = points["none"].peak, points["layer"].peak
    points |= {f"torch {b:g}": _torch_point(case, b, precision) for b in TORCH_BUDGETS if case.loss is not None}
    wanted = {f"ROI {share:.0%}": int(share * none) for share in SHARES if share * none > 0.8 * layer}
    wanted["ROI at layer's peak"] = layer
    wanted |= {f"ROI at {p.name}'s peak": min(p.peak, none) for p in points.values() if p.name.startswith("torch")}
    for name, peak in wanted.items():
        try:
            points[name] = _point(case, name, Remat(budget=arguments + peak), precision)
        except ImpossibleBudget as error:
            if peak >= layer:
                raise
            print(f"{case.name}: {name} is refused: {error}", flush=True)
    began = time.perf_counter()
    points["none"].call()
    for _ in range(max(rounds, int(3 / (time.perf_counter() - began)))):
        for point in points.values():
            began = time.perf_counter()
            point.call()
            point.seconds.append(time.perf_counter() - began)
    return points


def _point(case: Case, name: str, remat: Remat, precision: Precision) -> Point:
    step = ftrain.jit(case.step, donate=case.donate, remat=remat, precision=precision)
    args = list(case.args)
    if case.donate is not None:
        args[0] = ftrain.tree.map(lambda x: x.clone() if isinstance(x, Tensor) else x, args[0])

    def call() -> Any:
        out = step(*args)
        if case.donate is not None:
            args[0] = out[0]
        finish(case.args)
        return None if case.donate is not None else out

    call()
    return Point(name, call, measure_peak(call).peak)


def _torch_point(case: Case, budget: float, precision: Precision) -> Point:
    """torch's min-cut partitioner with a budget (0: recompute all, 1: its default), without Inductor."""
    assert case.loss is not None
    params, tokens = case.args
    leaves, treedef = ftrain.tree.flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = case.loss
    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = torch.compile(
            lambda *leaves: loss(ftrain.tree.unflatten(treedef, [x.to(precision.dtype) for x in leaves]), tokens),
            backend="aot_eager_decomp_partition",
        )

        def call() -> Any:
            grads = torch.autograd.grad(compiled(*leaves), leaves)
            finish(leaves)
            return grads

        call()
    return Point(f"torch {budget:g}", call, measure_peak(call).peak)


def finish(arguments: Any) -> None:
    """Wait for the device of the arguments."""
    if any(x.is_cuda for x in ftrain.tree.leaves(arguments) if isinstance(x, Tensor)):
        torch.cuda.synchronize()


def rows_of(model: str, points: dict[str, Point]) -> list[Row]:
    """The curve of a model, and what it says about the goals."""
    none, layer = points["none"], points["layer"]
    rows = [
        row(f"{model}: {p.name}", p.time / none.time, "x step", peer=f"{p.peak / 1e6:.0f} MB", how=_curve_how(none))
        for p in points.values()
    ]
    same = points["ROI at layer's peak"]
    rows.append(
        row(
            f"{model}: extra time at layer's peak, over layer's",
            max(0.0, same.time - none.time) / max(layer.time - none.time, 1e-9), "x", goal=0.5,
            valid=same.peak <= 1.02 * layer.peak, peer=f"{(layer.time / none.time - 1):.1%} extra for layer",
            how=f"measured peaks {same.peak / 1e6:.0f} and {layer.peak / 1e6:.0f} MB",
        )
    )  # fmt: skip
    if "ROI 60%" in points:
        extra = points["ROI 60%"].time / none.time - 1
        how = "of the memory beyond the arguments that the step takes without recompute"
        rows.append(row(f"{model}: extra time at 60% of the memory", extra, "x", goal=0.03, how=how))
    for name in [n for n in points if n.startswith("torch")]:
        ours, theirs = points[f"ROI at {name}'s peak"], points[name]
        rows.append(
            row(f"{model}: step at the peak of {name}, over its step", ours.time / theirs.time, "x", goal=1.0,
                valid=ours.peak <= 1.02 * theirs.peak, peer=f"{theirs.peak / 1e6:.0f} MB",
                how=f"ours takes {ours.peak / 1e6:.0f} MB; torch's partitioner on the same function")
        )  # fmt: skip
    return rows


def _curve_how(none: Point) -> str:
    return f"over {none.time * 1e3:.0f} ms with nothing recomputed; the peak beyond the arguments, measured"


def planning_row() -> Row:
    """How long a budget takes to plan for 48 layers, tracing not counted."""
    case = llama(Llama(layers=48), real=False)
    plain = ftrain.jit(case.step).lower(*case.args)
    budget = int(input_bytes(plain.graph) + 0.4 * (plain.memory().peak - input_bytes(plain.graph)))
    found = []
    for remat in (Remat("none"), Remat(budget=budget)):
        began = time.process_time()
        ftrain.jit(case.step, remat=remat).lower(*case.args)
        found.append(time.process_time() - began)
    nodes = len(plain.graph.graph.nodes)
    return row(
        "planning for 48 layers", found[1] - found[0], "s of one core", goal=10.0,
        how=f"lowering with a budget - without; {nodes} nodes without recompute",
    )  # fmt: skip


def draw(curves: dict[str, list[Point]], file: Path) -> None:
    """Step time against peak, a panel for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    for axes, (model, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        none = points[0].time
        for kind, marker in (("ROI", "o"), ("torch", "x"), ("none", "s"), ("layer", "^")):
            mine = sorted((p for p in points if p.name.startswith(kind)), key=lambda p: p.peak)
            line = "-" if kind in ("ROI", "torch") else ""
            axes.plot([p.peak / 1e6 for p in mine], [p.time / none for p in mine], line, marker=marker, label=kind)
        axes.set(title=model, xlabel="peak beyond the arguments, MB", ylabel="step time / nothing recomputed")
        axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
