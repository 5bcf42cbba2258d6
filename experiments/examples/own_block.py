"""Parts of a decoder of your own: bilinear MLPs, and in every second layer attention and MLP side by side.

python -m experiments.examples.own_block
"""

from dataclasses import replace
from typing import Any

import torch

import ftrain
from ftrain import TrainState, optim
from ftrain.modules import decoder, norm
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block
from ftrain.modules.generation import decoder_family, generate
from ftrain.modules.layers import attention_block
from ftrain.modules.spec import ParamSpec, fan_in

TEXT = b"the cat sat on the mat and saw the rat; the rat sat on the hat and saw the cat; " * 6
D, F = 64, 96  # widths of the model and of an MLP
READS = AttentionConfig(D, heads=4, kv_heads=2, head_dim=16)
ATTENTION = attention_block(READS)  # its keys and values go through at.attend, as those of your own would
INTO = ParamSpec((D, F), ("embed", "mlp"), fan_in(D))
BILINEAR = Block(
    lambda gain: {"w_gate": INTO, "w_up": INTO, "w_down": ParamSpec((F, D), ("mlp", "embed"), fan_in(F, gain=gain))},
    lambda p, x_TD, at: ((x_TD @ p["w_gate"]) * (x_TD @ p["w_up"])) @ p["w_down"],
)


def side_by_side(params: Any, x_TD: torch.Tensor, at: Any) -> torch.Tensor:
    """A whole layer: both parts read the same normed rows."""
    normed_TD = norm.apply(params["norm"], x_TD)
    return x_TD + at.run(ATTENTION, params["attention"], normed_TD) + at.run(BILINEAR, params["mlp"], normed_TD)


PARALLEL = Block(
    lambda gain: {"norm": norm.specs(D), "attention": ATTENTION.specs(gain), "mlp": BILINEAR.specs(gain)}, side_by_side
)
BASE = decoder.DecoderConfig(256, D, layers=4, attention=READS, d_hidden=F)
CONFIG = replace(BASE, pattern=(decoder.layer_with(BASE, mlp=BILINEAR), PARALLEL))


def main(steps: int = 30) -> tuple[float, str]:
    """Train on the text, and return the last loss and what the model writes after "the cat "."""
    tokens = torch.tensor(list(TEXT))
    batch = {"tokens": tokens, "positions": torch.arange(len(TEXT)), "labels": decoder.next_token_labels(tokens, None)}
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(5e-3))

    def loss_fn(params: Any, batch: Any) -> Any:
        hidden, _ = decoder.apply(params, batch["tokens"], positions=batch["positions"], segments=None, cfg=CONFIG)
        return decoder.loss(params, hidden, batch["labels"], CONFIG)

    @ftrain.jit(donate="state", remat="layer")
    def step(state: TrainState, batch: Any) -> Any:
        loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
        return state.apply(tx, grads), loss

    state = TrainState.create(ftrain.init(decoder.specs(CONFIG), ftrain.key(0)), tx)
    for _ in range(steps):
        state, loss = step(state, batch)
    (written,) = generate(state.params, [list(b"the cat ")], family=decoder_family(CONFIG), max_new=40)
    text = bytes(written).decode(errors="replace")
    print(f"loss {float(loss):.3f}: the cat {text}")
    return float(loss), text


if __name__ == "__main__":
    main()
