"""Train a small residual codec (Mimi's shape) on spoken numbers, and see whether voices that are held out come back.

python -m experiments.stream.codec [--steps N] [--json FILE]

Parameters by gradient, codebooks as averages, a state of the step. A judge that was trained on real words of trained
voices says of how many held-out words it still hears what they are when they come back from their codes.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

import ftrain
from experiments.bench.table import Row, publish, row
from experiments.omni import corpus
from experiments.omni.corpus import Clips
from experiments.stream import words
from ftrain import TrainState, optim
from ftrain.bridge.native_mimi import native_mimi
from ftrain.modules import codebook, codebook_averages
from ftrain.modules.families import mimi, mimi_config
from ftrain.modules.families.mimi_config import MimiConfig
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree
from ftrain.modules.spectral_loss import SpectralConfig, spectral_terms

SMALL: dict[str, Any] = {
    "model_type": "mimi", "sampling_rate": corpus.RATE, "hidden_size": 64, "num_filters": 8,
    "upsampling_ratios": [8, 8, 4], "num_hidden_layers": 1, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 4, "codebook_size": 128, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32,
    "num_quantizers": 4, "upsample_groups": 64, "sliding_window": 16, "layer_scale_initial_scale": 0.3,
}  # fmt: skip
_SHOWN = 25


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    steps: int = 120
    """updates"""
    batch: int = 8
    """clips of a step"""
    rate: float = 3e-3
    """peak learning rate"""
    threads: int = 1
    """CPU threads of each op"""
    seed: int = 0
    """of the clips, the weights and the order"""
    json: Path | None = None
    """also write the rows to this file"""


def main(options: Options) -> list[Row]:
    """Make the clips, train, judge, print and write the rows. ValueError without espeak-ng."""
    trained, _, held_out = words.clips(takes=2, seed=options.seed)
    return run(options, trained, held_out, SMALL)


def run(options: Options, trained: Clips, held_out: Clips, told: Mapping[str, Any]) -> list[Row]:
    """The same with clips that are there, to train on and of held-out voices, and a codec of any size."""
    torch.set_num_threads(options.threads)
    model = native_mimi(told)
    begun = TrainState.create(ftrain.init(model.specs, ftrain.key(options.seed)), optimizer(options), extra=model.state)
    ended = fit(model, begun, trained, options, mimi_config.config(told))
    units = words.learnt_units(trained, seed=options.seed)
    judge = words.judge(*(words.said(one, units) for one in (trained, held_out)))
    before, after = (measured(model, x, held_out, mimi_config.config(told)) for x in (begun, ended))
    how = f"{options.steps} steps of {options.batch} clips; {len(held_out.labels_N)} words of held-out voices"
    rows = [
        row(name, value, "", goal=before.terms[name], peer=round(before.terms[name], 4), how=f"{how}; peer: untrained")
        for name, value in after.terms.items()
    ]
    heard = {
        name: judge.told(words.said(x.clips, units).units_NU) for name, x in (("", after), (", untrained", before))
    }
    for name, told_N in heard.items():
        missed = float(np.mean(told_N != held_out.labels_N))
        peer = round(1 - judge.held_out, 4)
        rows.append(row(f"words not heard{name}", missed, "", peer=peer, how=f"{how}; peer: as they were spoken"))
    rows += [
        row(
            f"entries in use, level {i}",
            x,
            "",
            how=f"{how}; of {told['codebook_size']}; e to the entropy of their shares",
        )
        for i, x in enumerate(after.used)
    ]
    publish(rows, "a residual codec of spoken numbers", options.json)
    return rows


def optimizer(options: Options) -> optim.Transform:
    """Adam with a warm-up and a cosine."""
    rate = optim.warmup_cosine(options.rate, warmup_steps=min(20, options.steps // 5 + 1), total_steps=options.steps)
    return optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, weight_decay=0.0))


def fit(model: Model, state: TrainState, trained: Clips, options: Options, cfg: MimiConfig) -> TrainState:
    """The state after all steps; its `extra` is that of the codebooks, which begin upon latents."""
    tx, rng, began = optimizer(options), np.random.default_rng(options.seed), time.monotonic()

    @ftrain.jit
    def step(state: TrainState, batch: Any) -> Any:
        def loss(params: Tree) -> Any:
            return model.loss(params, batch, state=state.extra)

        (value, books), grads = ftrain.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply(tx, grads).replace(extra=books), value

    for i in range(options.steps):
        batch = {"audio": _audio(trained, rng.choice(len(trained.labels_N), options.batch, replace=False))}
        if i < options.steps // 2 and i % max(options.steps // 8, 1) == 0:
            key = ftrain.fold_in(ftrain.key(options.seed), i)
            state = state.replace(extra=_revived(state, batch, cfg, key, least=0.7 if i else 2.0))
        state, value = step(state, batch)
        if i % _SHOWN == 0 or i == options.steps - 1:
            print(f"step {i}: {float(value):.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return state


def _revived(state: TrainState, batch: Any, cfg: MimiConfig, key: torch.Tensor, *, least: float) -> Tree:
    """The codebooks whose entries that nothing uses are set upon latents of the batch."""
    with torch.no_grad():
        latents = mimi.latents(state.params, batch["audio"], cfg)
        found = mimi.quantize(state.params, state.extra, latents, cfg)
    return {
        name: codebook_averages.revived(state.extra[name], one.left_QRZ, key=key, least=least)
        for name, (_, one) in found.items()
    }


class Measured(NamedTuple):
    """The terms of the loss, the clips that came back, and how many entries of each level are used in effect."""

    terms: dict[str, float]
    clips: Clips
    used: list[float]


def measured(model: Model, state: TrainState, held_out: Clips, cfg: MimiConfig) -> Measured:
    """What becomes of held-out clips."""
    audio = _audio(held_out, np.arange(len(held_out.labels_N)))
    with torch.no_grad():
        codes_BQF = model.outputs(state.params, {"audio": audio}, state=state.extra)
        made = mimi.decode(state.params, state.extra, codes_BQF, cfg)[..., : audio.shape[-1]]
        spectra = spectral_terms(made, audio, SpectralConfig(cfg.rate), torch.full((len(audio),), audio.shape[-1]))
    counts = torch.nn.functional.one_hot(codes_BQF, cfg.codes).sum((0, 2)).float()
    terms = {name: mean.item() for name, mean in spectra.items()}
    back = held_out._replace(waves_NS=made[:, 0].numpy())
    return Measured(terms, back, codebook.perplexity(counts).tolist())


def _audio(clips: Clips, chosen: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(clips.waves_NS[chosen])[:, None]


if __name__ == "__main__":
    main(tyro.cli(Options))
