"""Parts of a decoder of your own: bilinear MLPs, and in every second layer attention and MLP side by side.

python -m experiments.examples.own_block [--steps 30]
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from torch import Tensor

import ftrain
from ftrain import TrainState, optim
from ftrain.modules import decoder, norm
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Context
from ftrain.modules.generation import decoder_family, generate
from ftrain.modules.layers import attention_block
from ftrain.modules.spec import ParamSpec, fan_in

TEXT = b"the cat sat on the mat and saw the rat; the rat sat on the hat and saw the cat; " * 6
D, F = 64, 96  # widths of the model and of an MLP
BASE = decoder.DecoderConfig(
    256, D, layers=4, attention=AttentionConfig(D, heads=4, kv_heads=2, head_dim=16), d_hidden=F
)
ATTENTION = attention_block(BASE.attention)  # its keys and values go through at.attend, as those of your own would


def mlp_specs(out_gain: float) -> dict[str, Any]:
    into = ParamSpec((D, F), ("embed", "mlp"), fan_in(D))
    return {"w_gate": into, "w_up": into, "w_down": ParamSpec((F, D), ("mlp", "embed"), fan_in(F, gain=out_gain))}


def mlp_apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
    return ((x_TD @ params["w_gate"]) * (x_TD @ params["w_up"])) @ params["w_down"]


def layer_specs(out_gain: float) -> dict[str, Any]:
    return {"norm": norm.specs(D), "attention": ATTENTION.specs(out_gain), "mlp": BILINEAR.specs(out_gain)}


def layer_apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
    normed_TD = norm.apply(params["norm"], x_TD)
    read_TD = at.run(ATTENTION, params["attention"], normed_TD)
    return x_TD + read_TD + at.run(BILINEAR, params["mlp"], normed_TD)


BILINEAR, PARALLEL = Block(mlp_specs, mlp_apply), Block(layer_specs, layer_apply)
CONFIG = replace(BASE, pattern=(decoder.layer_with(BASE, mlp=BILINEAR), PARALLEL))


@dataclass(frozen=True)
class Options:
    """How long to train."""

    steps: int = 30


def main(options: Options) -> tuple[float, str]:
    """Train on the text, and return the last loss and what the model writes after "the cat "."""
    tokens = torch.tensor(list(TEXT))
    batch = {"tokens": tokens, "positions": torch.arange(len(TEXT)), "labels": decoder.next_token_labels(tokens, None)}
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(5e-3))

    def loss_fn(params: Any, batch: Any) -> Any:
        hidden, _ = decoder.apply(params, batch["tokens"], positions=batch["positions"], segments=None, cfg=CONFIG)
        return decoder.loss(params, hidden, batch["labels"], CONFIG)

    def train_step(state: TrainState, batch: Any) -> Any:
        loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
        return state.apply(tx, grads), {"loss": loss}

    step = ftrain.jit(train_step, donate="state", remat="layer")
    state = TrainState.create(ftrain.init(decoder.specs(CONFIG), ftrain.key(0)), tx)
    for _ in range(options.steps):
        state, metrics = step(state, batch)
    (written,) = generate(state.params, [list(b"the cat ")], family=decoder_family(CONFIG), max_new=40)
    text = bytes(written).decode(errors="replace")
    print(f"loss {float(metrics['loss']):.3f}: the cat {text}")
    return float(metrics["loss"]), text


if __name__ == "__main__":
    main(tyro.cli(Options))
