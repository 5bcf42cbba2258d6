"""What is a step of frozen towers spared when it reads what they made before? The same step by turns, both ways.

    python -m experiments.bench.cached_media --json experiments/bench/results/cached-media-cpu.json

Towers are not trained: with them each step computes what they make of its pictures, films and sounds; without them it
reads that (`ftrain train ... --cache-media`). All else is trained, and the losses of both are compared.
"""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import tyro
from torch import Tensor

import ftrain
from experiments.bench import omni_samples
from experiments.bench.machine import device_title
from experiments.bench.omni import DECAY, LARGEST_NORM, RATE, Options
from experiments.bench.omni_samples import Kind
from experiments.bench.side import Side
from experiments.bench.table import Row, publish, row
from ftrain.analysis.meter import measure_peak
from ftrain.modules.model import Model
from ftrain.modules.pictures import GRIDS, PIXELS, ROWS, MediaConfig
from ftrain.modules.sounds import ROWS as SOUND_ROWS
from ftrain.modules.sounds import SOUND
from ftrain.optim import adamw, chain, clip_by_global_norm
from ftrain.step.state import TrainState

_SAME_LOSS = 1e-5  # relative


def main(options: Options) -> int:
    """Run, print the rows, and write them; 1 if the losses differ."""
    rows: list[Row] = []
    for kind in options.models:
        rows += compare(kind, options)
        publish(rows, f"steps by towers and by what they made, {device_title('cpu')}", options.json)
    return int(any(r.ok is False for r in rows))


def compare(kind: Kind, options: Options) -> list[Row]:
    """Rows of one model: time and memory of a step without its towers over those with them."""
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as made:
        described = omni_samples.model(kind, quick=options.quick)
        described.save_pretrained(made)
        model = ftrain.hf.open(made, native="always")
        assert model.load is not None
        params = model.load()
    cfg = omni_samples.media_of(described.config)
    batches = omni_samples.packs(described.config, rounds + 3, tokens=options.tokens, quick=options.quick)
    raw = [omni_samples.pack(batch, tokens=options.tokens) for batch in batches]
    budgets = omni_samples.budgets(batches, hears=cfg.sound is not None)
    sides = [
        _side("towers", model, params, raw, budgets),
        _side("rows", model, params, [_as_rows(model, params, one, cfg) for one in raw], budgets),
    ]
    for number in range(rounds + 2):
        for side in sides:
            side.run(number, kept=number >= 2)
        print(f"{kind}: step {number + 1} of {rounds + 2}", flush=True)
    for side in sides:
        side.peak = measure_peak(lambda side=side: side.step(rounds + 2)).peak  # type: ignore[misc]
    towers, rows = sides
    apart = max(abs(a - b) / abs(b) for a, b in zip(rows.losses, towers.losses, strict=True))
    media = statistics.mean(float(torch.isin(one["tokens"], torch.tensor(cfg.ids)).float().mean()) for one in raw)
    how = (
        f"a pack of {options.tokens} tokens a step, of which {media:.0%} stand for media; towers frozen, all else "
        f"trained, float32, AdamW; medians of {rounds} alternating steps; valid only if losses agree to {_SAME_LOSS}"
    )
    ratio = statistics.median(a / b for a, b in zip(rows.cpu_seconds, towers.cpu_seconds, strict=True))
    return [
        row(f"{kind}: CPU time of a step by rows over that by towers", ratio, "x",
            peer=statistics.median(towers.cpu_seconds), valid=apart <= _SAME_LOSS,
            how=f"{how}; peer: by towers in seconds"),
        row(f"{kind}: memory above the state by rows over that by towers", rows.peak / towers.peak, "x",
            peer=towers.peak / 2**20, how=f"{how}; peer: by towers in MiB"),
    ]  # fmt: skip


def _side(
    name: str, model: Model, params: Any, raw: Sequence[Mapping[str, Tensor]], budgets: Mapping[str, int]
) -> Side:
    assert model.media is not None
    assert model.towers is not None
    packs = [model.media(one, **budgets) for one in raw]
    frozen = {node: params[node] for node in model.towers.paths}
    tx = chain(clip_by_global_norm(LARGEST_NORM), adamw(RATE, weight_decay=DECAY))

    def train_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Tensor]:
        def loss(own: Any, batch: dict[str, Any]) -> Any:
            return model.loss({**own, **state.extra["frozen"]}, batch)

        mean, grads = ftrain.value_and_grad(loss)(state.params, batch)
        return state.apply(tx, grads), mean

    step = ftrain.jit(train_step, donate="state")
    own = {node: ftrain.tree.map(lambda x: x.clone(), tree) for node, tree in params.items() if node not in frozen}
    held = [TrainState.create(own, tx, extra={"frozen": ftrain.tree.map(lambda x: x.clone(), frozen)})]

    def one(number: int) -> float:
        held[0], loss = step(held[0], packs[number])
        return loss.item()

    return Side(name, one)


def _as_rows(model: Model, params: Any, raw: Mapping[str, Tensor], cfg: MediaConfig) -> dict[str, Tensor]:
    """The batch with rows in the place of media."""
    assert model.media is not None
    assert model.towers is not None
    made = model.media(raw)
    with torch.no_grad():
        rows = model.towers.rows(params, made)
    found = {name: leaf for name, leaf in raw.items() if name not in (*PIXELS.values(), SOUND)}
    tokens_T = raw["tokens"]
    for node, tokens in rows.items():
        at_T = tokens.new_zeros(len(tokens_T) + 1, *tokens.shape[1:])
        at_T[made[node]["index"]] = tokens
        kinds = {ROWS[kind]: cfg.id_of(kind) for kind in ROWS if GRIDS[kind] in raw} if node == "media" else {}
        if node == "audio" and cfg.sound is not None:
            kinds = {SOUND_ROWS: cfg.sound.token}
        found |= {leaf: at_T[:-1][tokens_T == token] for leaf, token in kinds.items()}
    return found


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
