"""The image tokenizer, trained first and then frozen: autoencoding real digits through a codebook."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import ftrain
from ftrain import Precision, optim
from ftrain.modules import codebook, vq_image
from ftrain.modules.vq_image import VqConfig

_REVIVE_EVERY = 50


class TokenizerState(NamedTuple):
    """`params` of the tokenizer, its optimizer's state, and how often each code was used since the last revival."""

    params: Any
    opt_state: Any
    usage_QK: Tensor


def train_tokenizer(
    images_NCHW: np.ndarray,
    *,
    cfg: VqConfig,
    steps: int,
    seed: int,
    batch: int = 64,
    device: torch.device,
    precision: Precision | None = None,
) -> tuple[Any, float]:
    """Parameters of a tokenizer of these images, and the last batch's mean squared error."""
    tx = optim.chain(
        optim.clip_by_global_norm(1.0),
        optim.adamw(optim.warmup_cosine(3e-3, warmup_steps=min(20, steps // 5), total_steps=steps)),
    )
    key = ftrain.key(seed).to(device)
    params = ftrain.init(vq_image.specs(cfg), ftrain.fold_in(key, 2))
    state = TokenizerState(params, tx.init(params), torch.zeros(cfg.depth, cfg.codes, device=device))

    def step(state: TokenizerState, images_BCHW: Tensor) -> tuple[TokenizerState, Tensor]:
        def loss_fn(params: Any, images_BCHW: Tensor) -> tuple[Any, Any]:
            loss, terms, codes = vq_image.loss(params, images_BCHW, cfg=cfg)
            return loss, (terms["reconstruction"].value(), codes)

        (_, (error, codes)), grads = ftrain.value_and_grad(loss_fn, has_aux=True)(state.params, images_BCHW)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        usage_QK = state.usage_QK + vq_image.usage(codes, cfg)
        return TokenizerState(optim.apply_updates(state.params, updates), opt_state, usage_QK), error

    jitted = ftrain.jit(step, donate="state", precision=precision)
    images = torch.from_numpy(images_NCHW)
    rng = np.random.Generator(np.random.Philox(key=[seed, 17]))
    error = torch.zeros(())
    for i in range(steps):
        chosen = torch.from_numpy(rng.choice(len(images), batch, replace=False))
        images_BCHW = images.index_select(0, chosen).to(device)
        if i % _REVIVE_EVERY == _REVIVE_EVERY - 1 and i < steps * 2 // 3:
            state = _revived(state, images_BCHW, ftrain.fold_in(key, 1000 + i), cfg)
        state, error = jitted(state, images_BCHW)
    return state.params, float(error)


def _revived(state: TokenizerState, images_BCHW: Tensor, key: Tensor, cfg: VqConfig) -> TokenizerState:
    """Codes that were not used are put where the data is, and counting starts again."""
    rows = vq_image.latents(state.params, images_BCHW, cfg=cfg)
    books = codebook.revive(state.params["codebooks_QKZ"], state.usage_QK, rows, key=key)
    return state._replace(params={**state.params, "codebooks_QKZ": books}, usage_QK=torch.zeros_like(state.usage_QK))
