"""How fast and how large is a training step? ftrain beside Hugging Face transformers, on equal weights and batches.

Both sides run in one process, turn by turn: packed documents of one length here, a batch of sequences there, so the
math is equal (the losses are compared). A step is forward, backward, clipping of the gradients' global norm to 1, and
AdamW: for them `torch.optim.AdamW` once as it comes (a loop over parameters on CPU) and once with `fused=True`. In
bfloat16 both keep float32 weights: ours are shown cast to the loss, theirs run under autocast.
"""

import dataclasses
import functools
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

import ftrain
from experiments.bench.hf_models import Shape, hf_model, our_config, our_parameters, with_experts
from experiments.bench.machine import device_title
from experiments.bench.table import Row, publish, row
from ftrain import Precision, tree
from ftrain.analysis.meter import measure_peak
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import nest
from ftrain.kernels.documents import Documents
from ftrain.modules import decoder, moe, spec
from ftrain.modules.decoder import DecoderConfig
from ftrain.optim import adamw, chain, clip_by_global_norm
from ftrain.step.state import TrainState
from ftrain.trace.precision import Choice, precision_on
from ftrain.trace.tracer import Aval

RATE, DECAY, LARGEST_NORM = 1e-4, 0.01, 1.0
SAME_LOSS = {"float32": 1e-4, "bfloat16": 5e-2}
"""How far losses of about 10 may be apart, by the dtype that both sides compute in."""
_GOALS, _BRIDGED_GOALS = (0.75, 0.6), (1.0, 0.7)
"""The most that our time and memory may be, as a share of eager transformers'."""


Part = Literal["llama", "moe", "bridge-llama", "bridge-moe", "trace", "overhead"]


@dataclass(frozen=True)
class Options:
    """Command line of the bench."""

    device: Literal["cpu", "cuda"] = "cpu"
    """where the steps run; on CUDA models and batches are larger"""
    precision: Choice = "auto"
    """in which dtype both sides compute over float32 weights; auto: bfloat16 on CUDA, float32 on a CPU"""
    json: Path | None = None
    """also write the rows to this file"""
    quick: bool = False
    """small models, few rounds: to see that it works, not to judge by"""
    rounds: int = 3
    """measured steps of each side (after two that are not)"""
    compiled: bool = True
    """also run Inductor on both sides (compiling takes minutes on CPU)"""
    only: tuple[Part, ...] = ("llama", "moe", "bridge-llama", "bridge-moe", "trace", "overhead")
    """which parts to run"""
    neighbours: int = 0
    """processes that count numbers all the while, on a core each: how steps do on a machine that others use"""


class Batch(NamedTuple):
    """`tokens_BL`: B documents of L tokens each; `packed`: the same one after the other, as our loaders make them."""

    tokens_BL: Tensor
    packed: dict[str, Any]


@dataclass
class Side:
    """One way to run the step: `step(batch)` makes one update and returns the loss; what was measured of it."""

    name: str
    step: Callable[[Batch], float]
    plan: Callable[[Batch], int] | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0


def main(options: Options) -> list[Row]:
    """Run the chosen parts, print their rows, and write them."""
    parts = {
        "llama": lambda: compare("llama", _shape("llama", options), options),
        "moe": lambda: compare("qwen3-moe", _shape("moe", options), options),
        "bridge-llama": lambda: compare("bridged llama", _shape("llama", options), options, bridged=True),
        "bridge-moe": lambda: compare("bridged qwen3-moe", _shape("moe", options), options, bridged=True),
        "trace": lambda: trace_rows(layers=4 if options.quick else 48),
        "overhead": overhead_rows,
    }
    rows: list[Row] = []
    with _busy(options.neighbours):
        for name in options.only:
            rows += parts[name]()
            gc.collect()
    beside = f", beside {options.neighbours} busy" if options.neighbours else ""
    publish(rows, f"step, {device_title(options.device)}{beside}", options.json)
    return rows


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    """So many processes at work while the context is open."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _shape(family: str, options: Options) -> Shape:
    if options.quick:
        base = Shape(vocab=2048, d_model=128, layers=2, heads=4, kv_heads=2, head_dim=32, d_hidden=352)
    elif options.device == "cuda":
        base = Shape(vocab=32_000, d_model=1024, layers=12, heads=16, kv_heads=4, head_dim=64, d_hidden=4096)
    else:
        base = Shape(vocab=32_000, d_model=512, layers=6, heads=8, kv_heads=4, head_dim=64, d_hidden=1408)
    return base if family == "llama" else with_experts(base)


def _sizes(options: Options) -> tuple[int, int]:
    """Documents of a batch, and tokens of each."""
    if options.quick:
        return 4, 64
    return (8, 2048) if options.device == "cuda" else (8, 256)


def _precision(options: Options) -> Precision:
    return precision_on(torch.device(options.device), options.precision)


def compare(name: str, shape: Shape, options: Options, *, bridged: bool = False) -> list[Row]:
    """Rows of one family: milliseconds and peak bytes of each side, and our share of theirs.

    `bridged`: transformers' own module as pure functions in the place of the library's; neither side then has the loss
    that balances experts.
    """
    documents, length = _sizes(options)
    compute = _precision(options).compute
    batches = [_batch(shape, documents, length, i, options.device) for i in range(options.rounds + 2)]
    sides = _bridged_sides(shape, options) if bridged else _sides(shape, options)
    for i, batch in enumerate(batches):
        for side in sides:
            _measure_step(side, batch, kept=i >= 2)
    extra = _batch(shape, documents, length, len(batches), options.device)
    for side in sides:
        gc.collect()
        side.peak = measure_peak(functools.partial(side.step, extra)).peak
    cfg = our_config(shape)
    what = (
        f"{name}: {spec.count(decoder.specs(cfg)) / 1e6:.0f}M parameters, {documents} documents x {length} tokens, "
        f"{compute}, clip {LARGEST_NORM}, AdamW; medians of {options.rounds} alternating steps"
    )
    return _rows(name, sides, extra, what, SAME_LOSS[compute])


def _batch(shape: Shape, documents: int, length: int, seed: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(0, shape.vocab, (documents, length), generator=generator)
    packed = tree.map(lambda x: x.to(device), _packed(tokens_BL))
    return Batch(tokens_BL.to(device), packed)


def _packed(tokens_BL: Tensor) -> dict[str, Any]:
    """The documents one after the other."""
    documents, length = tokens_BL.shape
    tokens_T = tokens_BL.flatten()
    at_T = torch.arange(documents * length)
    segments_T = at_T // length
    return {
        "tokens_T": tokens_T,
        "positions_T": at_T % length,
        "documents": Documents.of(segments_T, longest=length),
        "labels_T": decoder.next_token_labels(tokens_T, segments_T),
    }


def _sides(shape: Shape, options: Options) -> list[Side]:
    torch.manual_seed(0)
    model = hf_model(shape)
    weights = model.state_dict()
    cfg = our_config(shape)
    params = our_parameters(model, cfg)
    params = spec.map_with_paths(lambda _, x: x.to(options.device), params)
    backends = ["aten", "inductor"] if options.compiled else ["aten"]
    precision = _precision(options)
    sides = [_our_side(params, cfg, backend, precision) for backend in backends]
    kinds = [("transformers eager", False, None), ("transformers eager, fused AdamW", False, True)]
    if options.compiled:
        kinds.append(("transformers torch.compile, fused AdamW", True, True))
    return sides + [
        _their_side(label, shape, weights, options.device, precision, compiled, fused)
        for label, compiled, fused in kinds
    ]


def _bridged_sides(shape: Shape, options: Options) -> list[Side]:
    """transformers' module through the bridge, kept and recomputed by layer, and the same module by itself."""
    torch.manual_seed(0)
    module = hf_model(shape, balanced=False)
    model, weights, precision = from_transformers(module.config), module.state_dict(), _precision(options)
    params = nest({name: p.detach().to(options.device) for name, p in module.named_parameters()})

    def loss_fn(params: Any, batch: dict[str, Any]) -> Tensor:
        names = {"tokens": "tokens_T", "positions": "positions_T", "segments": "documents", "labels": "labels_T"}
        value: Tensor = model.loss(params, {leaf: batch[name] for leaf, name in names.items()}).value()
        return value

    sides = [
        _jitted_side("ftrain aten", params, loss_fn, precision),
        _jitted_side("ftrain aten by layer", params, loss_fn, precision, remat="layer"),
    ]
    kinds = [("transformers eager", None), ("transformers eager, fused AdamW", True)]
    return sides + [
        _their_side(label, shape, weights, options.device, precision, False, fused, balanced=False)
        for label, fused in kinds
    ]


def _our_side(params: Any, cfg: DecoderConfig, backend: str, precision: Precision) -> Side:
    def loss_fn(params: Any, batch: dict[str, Any]) -> Tensor:
        hidden_TD, stats = decoder.apply(
            params, batch["tokens_T"], positions=batch["positions_T"], segments=batch["documents"], cfg=cfg
        )
        loss = decoder.loss(params, hidden_TD, batch["labels_T"], cfg).value()
        if cfg.moe is not None and stats.router is not None:
            loss = loss + cfg.moe.aux_coefficient * moe.aux_loss(moe.pool(stats.router)).value()
        return loss

    return _jitted_side(f"ftrain {backend}", params, loss_fn, precision, backend=backend)


def _jitted_side(name: str, params: Any, loss_fn: Callable[..., Tensor], precision: Precision, **options: Any) -> Side:
    """One update of a loss as a jitted step. `options`: of `ftrain.jit`."""
    tx = chain(clip_by_global_norm(LARGEST_NORM), adamw(RATE, weight_decay=DECAY))

    def train_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Tensor]:
        loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
        return state.apply(tx, grads), loss

    jitted = ftrain.jit(train_step, donate="state", precision=precision, **options)
    copied = spec.map_with_paths(lambda _, x: x.clone(), params)
    held = [TrainState.create(copied, tx)]

    def step(batch: Batch) -> float:
        held[0], loss = jitted(held[0], batch.packed)
        return loss.item()

    def planned(batch: Batch) -> int:
        return jitted.lower(held[0], batch.packed).memory().peak

    return Side(name, step, planned if options.get("backend", "aten") == "aten" else None)


def _their_side(
    name: str,
    shape: Shape,
    weights: Any,
    device: str,
    precision: Precision,
    compiled: bool,
    fused: bool | None,
    *,
    balanced: bool = True,
) -> Side:
    model = hf_model(shape, balanced=balanced)
    model.load_state_dict(weights)
    model.to(device)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY, fused=fused)

    def step(batch: Batch) -> float:
        with torch.autocast(device, precision.dtype, enabled=precision.compute != "float32"):
            loss = forward(input_ids=batch.tokens_BL, labels=batch.tokens_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Side(name, step)


def _measure_step(side: Side, batch: Batch, *, kept: bool) -> None:
    started, cpu = time.perf_counter(), time.process_time()
    loss = side.step(batch)  # reads the loss, so a CUDA device is done
    if kept:
        side.seconds.append(time.perf_counter() - started)
        side.cpu_seconds.append(time.process_time() - cpu)
    side.losses.append(loss)


def _rows(name: str, sides: Sequence[Side], batch: Batch, what: str, same: float) -> list[Row]:
    timed = what + "; peer: CPU time of the process, which other processes disturb less"
    rows = [
        row(
            f"{name}: step, {s.name}",
            1e3 * statistics.median(s.seconds),
            "ms",
            peer=1e3 * statistics.median(s.cpu_seconds),
            how=timed,
        )
        for s in sides
    ]
    rows += [row(f"{name}: peak above the state, {s.name}", s.peak / 2**20, "MiB", how=what) for s in sides]
    ours = [s for s in sides if s.name.startswith("ftrain")]
    theirs = [s for s in sides if not s.name.startswith("ftrain")]
    for mine in ours:
        for other in theirs:
            rows += _shares(name, mine, other, same)
    for side in ours:
        if side.plan is not None and side.peak:
            planned = side.plan(batch)
            how = "|planned / measured - 1| of the peak of one step beyond its arguments; peer: the plan in MiB"
            off = abs(planned / side.peak - 1)
            rows.append(
                row(f"{name}: plan against peak, {side.name}", off, "", goal=0.02, peer=planned / 2**20, how=how)
            )
    return rows


def _shares(name: str, mine: Side, other: Side, same_loss: float) -> list[Row]:
    """Our time and memory as a share of theirs; goals are for the same way of running: eager against eager."""
    apart = max(abs(a - b) for a, b in zip(mine.losses, other.losses, strict=True))
    judged = mine.name == "ftrain aten" and "eager" in other.name
    how = f"ours / theirs, valid only if all losses agree to {same_loss} (peer: the largest difference)"
    time_share = statistics.median(mine.seconds) / statistics.median(other.seconds)
    pair, same = f"{mine.name} / {other.name}", apart <= same_loss
    of_family = _BRIDGED_GOALS if name.startswith("bridged") else _GOALS
    goals = of_family if judged else (None, None)
    return [
        row(f"{name}: time, {pair}", time_share, "x", goal=goals[0], peer=apart, valid=same, how=how),
        row(f"{name}: memory, {pair}", mine.peak / other.peak, "x", goal=goals[1], peer=apart, valid=same, how=how),
    ]


def trace_rows(layers: int) -> list[Row]:
    """Seconds to lower a whole step of Qwen3-30B-A3B (all `layers` of it) on shapes alone."""
    cfg = dataclasses.replace(decoder.preset("30b-a3b"), layers=layers)
    tx = chain(clip_by_global_norm(LARGEST_NORM), adamw(RATE))

    def train_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Tensor]:
        def loss_fn(params: Any) -> Any:
            hidden_TD, _ = decoder.apply(
                params, batch["tokens"], positions=batch["positions"], segments=batch["segments"], cfg=cfg
            )
            return decoder.loss(params, hidden_TD, batch["labels"], cfg)

        loss, grads = ftrain.value_and_grad(loss_fn)(state.params)
        return state.apply(tx, grads), loss

    state = TrainState.create(spec.abstract(decoder.specs(cfg)), tx)
    ids = Aval((8192,), torch.int64, torch.device("cpu"))
    documents = Documents(ids, Aval((9,), torch.int32, torch.device("cpu")), 1024)  # type: ignore[arg-type]
    batch = {**dict.fromkeys(("tokens", "positions", "labels"), ids), "segments": documents}
    wall, cpu = time.perf_counter(), time.process_time()
    lowered = ftrain.jit(train_step, donate="state").lower(state, batch)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    nodes = len(lowered.graph.graph.nodes)
    how = (
        f"lower, passes included: 30b-a3b, {layers} layers, 8192 tokens, fake tensors, {nodes} nodes; peer: CPU seconds"
    )
    return [row(f"trace of 30b-a3b, {layers} layers", wall, "s", goal=20.0, peer=cpu, how=how)]


def overhead_rows() -> list[Row]:
    """Microseconds of a cached call whose graph does nothing, by the number of leaves of its donated state."""
    how = "wall time of a cached call with a donated state and no work, median of 60; peer: CPU time of the process"
    rows = []
    for leaves in (10, 400, 1500):
        step = ftrain.jit(lambda state, batch: dict(state.items()), donate="state")
        state, batch = {f"leaf{i}": torch.zeros(4) for i in range(leaves)}, torch.zeros(3)
        walls, cpus = [], []
        for i in range(70):
            wall, cpu = time.perf_counter(), time.process_time()
            state = step(state, batch)
            if i >= 10:
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
        value, peer = 1e6 * statistics.median(walls), 1e6 * statistics.median(cpus)
        rows.append(row(f"overhead of a call, {leaves} leaves", value, "us", goal=1000.0 + leaves, peer=peer, how=how))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options))
