"""How fast is a training step of a video transformer? ftrain beside diffusers, on the same clip.

    python -m experiments.bench.dit --json experiments/bench/results/dit-cpu.json

Both sides run in one process, turn by turn, from equal weights, on the same noised latents: theirs is diffusers' own
Wan, run eagerly, with each block checkpointed, as trainers of video models run it; ours recomputes as little as fits
the peak that theirs was measured at, a second one recomputes each layer as they do. A step is forward, backward,
clipping of the gradients' global norm to 1, and AdamW; of all weights, and of an adapter of rank 16 (PEFT's, there).
On the CPU the models are small and in float32; on a card they are Wan's 1.3B at 480 x 832 x 81 in bfloat16, and 4
blocks of the 14B. MFU counts all of attention.
"""

import gc
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import tyro
from torch import Tensor

import ftrain
from experiments.bench import dit_distilled
from experiments.bench.machine import device_title
from experiments.bench.side import Side
from experiments.bench.table import Row, publish, row
from experiments.wan_plan import forward_flops
from ftrain import lora
from ftrain.analysis.liveness import input_bytes
from ftrain.analysis.meter import measure_peak
from ftrain.bridge.native_wan import config_of
from ftrain.modules.families.wan_config import DIFFUSERS, WanConfig
from ftrain.modules.model import Model
from ftrain.optim import adamw, chain, clip_by_global_norm
from ftrain.remat.fit import ImpossibleBudget
from ftrain.remat.policy import Remat
from ftrain.step.state import TrainState

RATE, DECAY, LARGEST_NORM, RANK = 1e-4, 0.01, 1.0, 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
_SAME_LOSS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_GOAL = {"cpu": 1 / 1.3, "cuda": 1 / 1.6}  # of their time
_FLOPS = 989e12  # dense bfloat16 of an H100 a second


@dataclass(frozen=True)
class Case:
    """A model and the clip that it is trained on: latent `frames`, `height` and `width`."""

    name: str
    heads: int
    hidden: int
    layers: int
    frames: int
    height: int
    width: int
    text: int = 4096
    rows: int = 512

    @property
    def told(self) -> dict[str, Any]:
        """What diffusers' config.json says of it."""
        return {
            "_class_name": DIFFUSERS, "num_attention_heads": self.heads, "attention_head_dim": 128,
            "ffn_dim": self.hidden, "num_layers": self.layers, "text_dim": self.text,
        }  # fmt: skip

    @property
    def patches(self) -> int:
        """How many tokens the clip is."""
        return self.frames * self.height * self.width // 4


QUICK = Case("a tiny Wan", 1, 160, 3, 2, 16, 16, text=32)
SMALL = Case("a small Wan, 6 blocks", 3, 1536, 6, 5, 24, 32, text=256)
BLOCKS = Case("4 blocks of Wan 14B, 480 x 832 x 33", 40, 13824, 4, 9, 60, 104)
WHOLE = Case("Wan 1.3B, 480 x 832 x 81", 12, 8960, 30, 21, 60, 104)


@dataclass(frozen=True)
class Options:
    """Command line of the bench."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where to run"""
    rounds: int = 5
    """measured steps of each side, after two that are not"""
    quick: bool = False
    """a tiny model and one round: to see that it works, not to judge by"""
    json: Path | None = None
    """also write the rows to this file"""


def main(options: Options) -> int:
    """Run, print the rows, and write them; 1 if a goal is missed."""
    cases = (WHOLE, BLOCKS) if options.device == "cuda" else (SMALL,)
    rows: list[Row] = []
    for case in (QUICK,) if options.quick else cases:
        for adapted in (False, True):
            rows += compare(case, options, adapted=adapted)
            publish(rows, f"video transformers, {device_title(options.device)}", options.json)
    rows.append(dit_distilled.iteration(quick=options.quick))
    publish(rows, f"video transformers, {device_title(options.device)}", options.json)
    return int(any(r.ok is False for r in rows))


def compare(case: Case, options: Options, *, adapted: bool) -> list[Row]:
    """Rows of one model, of all its weights or of an adapter: our share of their time and memory, and MFU on a card."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as made:
        theirs = _module(case)
        theirs.save_pretrained(Path(made) / "transformer")
        model = ftrain.hf.open(Path(made) / "transformer")
        cfg = config_of(Path(made) / "transformer")
        assert model.load is not None
        params = ftrain.tree.map(lambda x: x.to(options.device), model.load())
        adapter, delta = lora.add(model, TARGETS, rank=RANK) if adapted else None, None
        if adapter is not None:
            delta = ftrain.tree.map(lambda x: x.to(options.device), adapter.init(ftrain.key(0)))
            lora.save_file(delta, adapter, Path(made) / "adapter.safetensors", style="diffusers", dtype=torch.float32)
            read = diffusers.WanPipeline.lora_state_dict(made, weight_name="adapter.safetensors")
    batch = _batch(case, cfg, options.device)
    theirs = theirs.to(options.device)
    if adapted:
        theirs.load_lora_adapter(read, adapter_name="ours")
        for name, p in theirs.named_parameters():
            p.requires_grad_(".lora_" in name)
    sides = [Side("diffusers", _eager(theirs, batch, dtype))]
    _tried(sides[0])
    for name, spare in (("ftrain", sides[0].peak), ("ftrain by layers", None)):
        sides.append(Side(name, _traced(model, params, delta, adapter, batch, dtype, spare)))
        _tried(sides[-1])
    rounds = 1 if options.quick else options.rounds
    for number in range(rounds):
        for side in sides:
            side.run(0, kept=True)
        print(f"{_titled(case, adapted)}: step {number + 1} of {rounds}: "
              + ", ".join(f"{s.name} {s.seconds[-1]:.2f} s" for s in sides), flush=True)  # fmt: skip
    return _rows(case, cfg, sides, options, adapted=adapted, dtype=dtype)


def _tried(side: Side) -> None:
    """Two steps that do not count, the second of which is measured for memory."""
    side.run(0, kept=False)
    gc.collect()
    side.peak = measure_peak(lambda: side.run(0, kept=False)).peak


def _module(case: Case) -> Any:
    """diffusers' transformer, every parameter random, so that gates are open."""
    torch.manual_seed(0)
    made = diffusers.WanTransformer3DModel.from_config(case.told)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "scale_shift_table" in name:
                p.normal_(0.0, 0.2)
    return made.train()


def _batch(case: Case, cfg: WanConfig, device: str) -> dict[str, Tensor]:
    """One clip as diffusers has it, noised, and what its velocity is to be."""
    generator = torch.Generator().manual_seed(1)
    sizes = (1, cfg.channels_out, case.frames, case.height, case.width)
    data, noise = (torch.randn(sizes, generator=generator) for _ in range(2))
    made = {
        "hidden_states": 0.4 * data + 0.6 * noise,
        "timestep": torch.tensor([600.0]),
        "encoder_hidden_states": torch.randn(1, case.rows, case.text, generator=generator),
        "target": noise - data,
    }
    return {name: leaf.to(device) for name, leaf in made.items()}


def _eager(module: Any, batch: Mapping[str, Tensor], dtype: torch.dtype) -> Callable[[int], float]:
    """A step on the one clip as trainers write it: float32 weights, autocast where the step is in bfloat16, blocks
    checkpointed.
    """
    module.enable_gradient_checkpointing()
    learned = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, RATE, weight_decay=DECAY, fused=True)
    asked = {name: leaf for name, leaf in batch.items() if name != "target"}

    def step(_: int) -> float:
        with torch.autocast(batch["target"].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = module(**asked).sample
        loss = torch.nn.functional.mse_loss(found.float(), batch["target"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _traced(
    model: Model, params: Any, delta: Any, adapter: lora.Adapter | None, batch: Mapping[str, Tensor],
    dtype: torch.dtype, spare: int | None,
) -> Callable[[int], float]:  # fmt: skip
    """Our step. `spare`: the bytes beyond its arguments that it may hold; None: each layer is recomputed."""
    tx = chain(clip_by_global_norm(LARGEST_NORM), adamw(RATE, weight_decay=DECAY))
    copied = ftrain.tree.map(lambda x: x.clone(), params if adapter is None else delta)
    held = [TrainState.create(copied, tx)]
    precision = None if dtype == torch.float32 else ftrain.Precision(compute="bfloat16", keep=model.keep)

    def loss_of(learned: Any, base: Any, batch: Mapping[str, Tensor]) -> Any:
        return model.loss(learned if adapter is None else lora.bind(base, learned, adapter), batch)

    def train_step(state: TrainState, base: Any, batch: Mapping[str, Tensor]) -> tuple[TrainState, Tensor]:
        mean, grads = ftrain.value_and_grad(loss_of)(state.params, base, batch)
        return state.apply(tx, grads), mean

    base = {} if adapter is None else params
    args = (held[0], base, dict(batch))
    jitted = ftrain.jit(train_step, donate="state", remat="layer", precision=precision)
    if spare is not None:
        budget = input_bytes(jitted.lower(*args).graph) + spare
        within = lambda budget: ftrain.jit(train_step, donate="state", remat=Remat(budget=budget), precision=precision)  # noqa: E731
        try:
            jitted = within(budget)
            jitted.lower(*args)
        except ImpossibleBudget as refused:  # the least that it can be: the row of memory says how much that is
            jitted = within(refused.smallest)

    def step(_: int) -> float:
        held[0], loss = jitted(held[0], base, dict(batch))
        return loss.item()

    return step


def _titled(case: Case, adapted: bool) -> str:
    return f"{case.name}, {f'adapter of rank {RANK}' if adapted else 'all weights'}"


def _rows(
    case: Case, cfg: WanConfig, sides: list[Side], options: Options, *, adapted: bool, dtype: torch.dtype
) -> list[Row]:
    theirs, ours, layered = sides
    title, same = _titled(case, adapted), _SAME_LOSS[dtype]
    apart = max(abs(a - b) for s in (ours, layered) for a, b in zip(theirs.losses, s.losses, strict=True))
    how = (
        f"width {cfg.d_model}, {case.patches} patches, {case.rows} rows of text, {str(dtype).partition('.')[2]}, clip "
        f"{LARGEST_NORM}, AdamW (theirs fused); diffusers {diffusers.__version__}, peft {peft.__version__}, blocks "
        f"checkpointed; medians of {len(theirs.seconds)} alternating steps; valid only if all losses agree to {same}, "
        f"and they agree to {apart:.1g}"
    )
    share = lambda side: statistics.median(a / b for a, b in zip(side.seconds, theirs.seconds, strict=True))  # noqa: E731
    eager = statistics.median(theirs.seconds)
    rows = [
        row(f"{title}: time of a step over theirs", share(ours), "x", goal=_GOAL[options.device], peer=eager,
            valid=apart <= same, how=f"{how}; peer: theirs in s"),
        row(f"{title}: the same, each layer recomputed", share(layered), "x", peer=eager, valid=apart <= same, how=how),
        row(f"{title}: memory above the state over theirs", ours.peak / theirs.peak, "x", peer=theirs.peak / 2**20,
            how=f"{how}; peer: theirs in MiB"),
        row(f"{title}: the same, each layer recomputed", layered.peak / theirs.peak, "x", peer=theirs.peak / 2**20,
            how=how),
    ]  # fmt: skip
    if options.device == "cuda":
        products, attention = forward_flops(cfg, case.patches)
        flops = (2 * products + 3 * attention) if adapted else 3 * (products + attention)
        used = flops / statistics.median(ours.seconds) / _FLOPS
        rows.append(row(f"{title}: FLOPs used of those of an H100", used, "", how=f"{how}; all of attention counted"))
    return rows


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
