"""What `remat.py` measures: a language model in plain torch, the main job's step, a stack of Wan-like DiT blocks.

The language model is plain torch, so that torch's own partitioner differentiates the very same function.

Legend: B sequences, L tokens of one, D width, H heads, K head width, F hidden width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

import ftrain
from experiments.omni import job
from ftrain import Precision
from ftrain.modules import dit
from ftrain.modules.dit import DitConfig

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A step and its arguments; `donate` as for `ftrain.jit`; `loss` where torch can differentiate it."""

    name: str
    step: Callable
    args: tuple
    donate: str | None = None
    loss: Callable | None = None


@dataclass(frozen=True)
class Llama:
    """Sizes of the language model."""

    layers: int = 4
    d_model: int = 512
    heads: int = 8
    d_hidden: int = 1408
    vocab: int = 4096
    batch: int = 4
    length: int = 1024


LARGE = Llama(layers=8, d_model=2048, heads=16, d_hidden=5632, vocab=32_000, batch=8, length=2048)
"""The language model of a card."""


def makers_on(device: torch.device, precision: Precision) -> dict[str, Callable[[], Case]]:
    """What makes each model on a device, in sizes that keep it busy."""
    card = device.type == "cuda"
    return {
        "llama": lambda: llama(LARGE if card else Llama(), device=device),
        "omni": lambda: omni_step("medium" if card else "tiny", device=device, precision=precision),
        "dit": lambda: dit_stack(DIT_LARGE if card else DIT, rows=16_384 if card else 1024, device=device),
    }


def llama(cfg: Llama, *, real: bool = True, device: torch.device = _CPU) -> Case:
    """Loss and gradients of a pre-norm decoder with SwiGLU and RoPE; not `real`: shapes alone."""
    d, f, v = cfg.d_model, cfg.d_hidden, cfg.vocab
    layer = {"norm1": (d,), "qkv": (d, 3 * d), "out": (d, d), "norm2": (d,)}
    layer |= {"gate": (d, f), "up": (d, f), "down": (f, d)}

    def make(shape: tuple[int, ...]) -> Any:
        return _weight(shape).to(device) if real else ftrain.Aval(shape, torch.float32, device)

    params = {
        "embedding": make((v, d)),
        "layers": [{name: make(shape) for name, shape in layer.items()} for _ in range(cfg.layers)],
        "norm": make((d,)),
        "head": make((d, v)),
    }
    tokens = torch.randint(0, v, (cfg.batch, cfg.length + 1)).to(device) if real else None
    aval = ftrain.Aval((cfg.batch, cfg.length + 1), torch.int64, device)

    def loss(params: Any, tokens_BL: Tensor) -> Tensor:
        return _llama_loss(params, tokens_BL, cfg.heads)

    return Case("Llama-like LLM", ftrain.value_and_grad(loss), (params, aval if tokens is None else tokens), loss=loss)


def _weight(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[0] ** -0.5


def _llama_loss(params: Any, tokens_BL: Tensor, heads: int) -> Tensor:
    x_BLD = nnf.embedding(tokens_BL[:, :-1], params["embedding"])
    turn = _rope(x_BLD, x_BLD.shape[2] // heads)
    for layer in params["layers"]:
        x_BLD = x_BLD + _attend(_norm(x_BLD, layer["norm1"]), layer, turn, heads)
        y_BLD = _norm(x_BLD, layer["norm2"])
        x_BLD = x_BLD + (nnf.silu(y_BLD @ layer["gate"]) * (y_BLD @ layer["up"])) @ layer["down"]
    logits_BLV = _norm(x_BLD, params["norm"]) @ params["head"]
    return nnf.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL[:, 1:].flatten())


def _norm(x_BLD: Tensor, weight_D: Tensor) -> Tensor:
    return x_BLD * torch.rsqrt(x_BLD.square().mean(-1, keepdim=True) + 1e-6) * weight_D


def _rope(x_BLD: Tensor, width: int) -> tuple[Tensor, Tensor]:
    length, device = x_BLD.shape[1], x_BLD.device
    turns = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * turns
    return angles.cos().to(x_BLD.dtype), angles.sin().to(x_BLD.dtype)


def _attend(x_BLD: Tensor, layer: Any, turn: tuple[Tensor, Tensor], heads: int) -> Tensor:
    q, k, v = (x_BLD @ layer["qkv"]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    out_BHLK = nnf.scaled_dot_product_attention(_turned(q, turn), _turned(k, turn), v, is_causal=True)
    return out_BHLK.transpose(1, 2).flatten(2) @ layer["out"]


def _turned(x_BHLK: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    (a, b), (cos, sin) = x_BHLK.chunk(2, -1), turn
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def omni_step(size: str, *, device: torch.device, precision: Precision) -> Case:
    """The main job's step in a size."""
    quiet = {"say": lambda text: None}
    work = job.make(
        size=size,
        steps=100,
        tokenizer_steps=2,
        seed=0,
        device=device,
        backend="auto",
        remat="none",
        precision=precision,
        **quiet,
    )
    state = work.fresh_state(quiet["say"])
    return Case("omni MoE", work.step.__wrapped__, (state, work.batches.at(0)), donate="state")


DIT = DitConfig(d_in=64, d_model=384, layers=4, heads=6, d_hidden=1536, d_text=256)
DIT_LARGE = DitConfig(d_in=64, d_model=1536, layers=8, heads=12, d_hidden=8960, d_text=256)
"""The diffusion transformer of a card: blocks as wide as those of Wan 1.3B."""


def dit_stack(cfg: DitConfig, *, rows: int, device: torch.device = _CPU) -> Case:
    """Loss and gradients of blocks as in Wan: one video of `rows` latents with text."""
    params = ftrain.tree.map(lambda p: p + 0.01, ftrain.init(dit.specs(cfg), ftrain.key(0, device=device)))
    frames = rows // 256
    grid = torch.stack(torch.meshgrid(torch.arange(frames), torch.arange(16), torch.arange(16), indexing="ij"))
    batch = {
        "data_NP": torch.randn(rows, cfg.d_in),
        "noise_NP": torch.randn(rows, cfg.d_in),
        "time_N": torch.full((rows,), 0.3),
        "positions_AN": grid.flatten(1),
        "text_SC": torch.randn(64, cfg.d_text),
    }
    batch = {name: x.to(device) for name, x in batch.items()}

    def loss(params: Any, batch: Any) -> ftrain.Mean:
        noisy = dit.noised(batch["data_NP"], batch["noise_NP"], batch["time_N"])
        velocity = dit.apply(
            params, noisy, time_N=batch["time_N"], positions_AN=batch["positions_AN"], segments_N=None,
            text_SC=batch["text_SC"], cfg=cfg,
        )  # fmt: skip
        return dit.flow_loss(velocity, batch["data_NP"], batch["noise_NP"])

    return Case("Wan-like DiT", ftrain.value_and_grad(loss), (params, batch))
