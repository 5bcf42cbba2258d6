"""The model: layers that see a window, a few that see all, experts in each, and encoders of pictures and sound.

Legend: T tokens, A answers, D width, H query heads, G key/value heads, K head dim.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import log
from typing import Any

import torch
from torch import Tensor

import ftrain
from experiments.long_context.haystack import KINDS, Sources
from experiments.omni import corpus
from ftrain import TrainState, optim
from ftrain.kernels.pack import take_rows
from ftrain.kernels.rms_norm import rms_norm
from ftrain.modules import attention, audio_encoder, decoder, omni, vision_encoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.audio_encoder import CONV_STRIDE, AudioConfig
from ftrain.modules.block import Block, Context
from ftrain.modules.decoder import DecoderConfig, DecoderStats, layer_with
from ftrain.modules.layers import attention_block
from ftrain.modules.moe import MoEConfig
from ftrain.modules.omni import OmniModel
from ftrain.modules.vision_encoder import VisionConfig

D_MODEL = 64
WINDOW = 16
"""Below the shortest documents: in a window that holds a whole document needles are found by it, and then no more."""

EMBEDDING = 0.3
"""The root mean square of a word's row before training, and of the row of a picture or a sound."""

_READERS = 0.3  # of the rate: what encoders are trained with
_SHORT = 4  # from a picture back to its name
_HOP = 128
_FLOOR = 256  # tokens: below, the scores of global layers are as they are


def readers() -> tuple[VisionConfig, AudioConfig]:
    """The encoders: a picture is one token, a spoken word is one."""
    image = VisionConfig(48, layers=2, heads=4, d_out=D_MODEL, patch=4, channels=1, merge=2)
    merge = corpus.SAMPLES // _HOP // CONV_STRIDE
    sound = AudioConfig(
        48, layers=2, heads=4, d_out=D_MODEL, rate=corpus.RATE, n_fft=256, hop=_HOP, mels=40, merge=merge
    )
    return image, sound


def foundation(vocab: int) -> DecoderConfig:
    """A sparse mixture of experts: a layer that sees four tokens, one that sees all, one that sees `WINDOW`.

    The short one joins a name to what stands behind it, which an attention over many tokens learns late. It has no
    positions: a word stands two tokens behind its name, a picture three, a question one, and what is learned of one
    holds for all.
    """
    heads = AttentionConfig(D_MODEL, heads=4, kv_heads=2, head_dim=D_MODEL // 4, qk_norm=True, window=WINDOW)
    wide = replace(heads, heads=2, kv_heads=1, head_dim=D_MODEL // 2, window=None, rope_base=None, qk_norm=False)
    experts = MoEConfig(D_MODEL, D_MODEL, experts=8, top_k=2, shared_experts=1, score="sigmoid", balance="bias")
    cfg = DecoderConfig(vocab, D_MODEL, 3, heads, moe=experts, tie_embeddings=True, init_std=EMBEDDING)
    short = layer_with(cfg, attention=attention_block(replace(heads, window=_SHORT, rope_base=None)))
    return replace(cfg, pattern=(short, layer_with(cfg, attention=seeing_all(wide)), None))


def seeing_all(cfg: AttentionConfig) -> Block:
    """Attention over the whole document without rotary positions, whose scores grow with the log of the position.

    Nothing in it depends on how far away a key is, so that it knows no length that it was not trained on; and a softmax
    over more keys needs scores that much larger to be as sharp (Nakanishi 2025, arXiv 2501.19399).
    """
    usual = attention_block(cfg)

    def apply(params: dict[str, Tensor], x_TD: Tensor, at: Context) -> Tensor:
        q_THK, k_TGK, v_TGK = attention.project(params, x_TD, cfg, None)
        sharper_T = ((at.positions + 1.0).clamp(min=_FLOOR).log() / log(_FLOOR)).to(q_THK.dtype)
        return attention.output(params, at.attend(q_THK * sharper_T[:, None, None], k_TGK, v_TGK))

    return Block(usual.specs, apply)


def omni_model(of: Sources) -> OmniModel:
    """Foundation and encoders for these sources."""

    def marks(name: str) -> dict[str, int]:
        return {"begin": of.words.id(f"<{name}>"), "end": of.words.id(f"</{name}>")}

    encoders = {
        "image": vision_encoder.encoder(of.image, **marks("image")),
        "audio": audio_encoder.encoder(of.audio, **marks("audio")),
    }
    return OmniModel(foundation(len(of.words)), encoders)


def entering(params: Any, batch: Mapping[str, Any], *, model: OmniModel) -> Tensor:
    """What the first layer reads, `[T, D]`: words, and media as large as words are at first.

    An encoder may make rows that are large and all alike. The name that the first layer adds would drown in them, and
    the layer that sees all would never look at them, so that the encoder would never learn.
    """
    rows, places, _ = omni.media_rows(params, batch, model=model)
    rows = [rms_norm(row_nD, torch.full_like(row_nD[0], EMBEDDING)) for row_nD in rows]
    return omni.merge(decoder.embed(params["foundation"], batch["tokens_T"]), rows, places)


def thoughts(params: Any, batch: Mapping[str, Any], *, model: OmniModel, balance: Any) -> tuple[Tensor, DecoderStats]:
    """Hidden states `[A, D]` of the tokens that answer, and the foundation's statistics."""
    x_TD = entering(params, batch, model=model)
    hidden_TD, stats = omni.hidden_states(params, x_TD, batch, model=model, balance=balance)
    return take_rows(hidden_TD, batch["place_A"]), stats


def init_state(model: OmniModel, tx: optim.Transform, key: Tensor) -> TrainState:
    """Fresh parameters, optimizer state and balance of the experts."""
    params = ftrain.init(omni.specs(model), ftrain.fold_in(key, 0))
    balance = ftrain.init(decoder.balance_specs(model.foundation), ftrain.fold_in(key, 1))
    return TrainState.create(params, tx, extra={"balance": balance})


Step = Callable[[TrainState, Any, Tensor], tuple[TrainState, dict[str, Any]]]


def train_step(model: OmniModel, tx: optim.Transform, kinds: Sequence[str] = KINDS) -> Step:
    """The pure step `(state, batch, key) -> (state, losses)`: nats of an answer for each of `kinds` of needles, which
    weigh alike; no key is used.
    """

    def step(state: TrainState, batch: Any, key: Tensor) -> tuple[TrainState, dict[str, Any]]:
        del key
        balance = state.extra["balance"]

        def loss_fn(params: Any, batch: Any) -> Any:
            hidden_AD, stats = thoughts(params, batch, model=model, balance=balance)
            terms = {}
            for kind in kinds:
                labels_A = torch.where(batch["kind_A"] == KINDS.index(kind), batch["answer_A"], decoder.IGNORE)
                terms[kind] = decoder.loss(params["foundation"], hidden_AD, labels_A, model.foundation)
            return ftrain.weighted_sum(terms, {}), (terms, stats)

        (_, (terms, stats)), grads = ftrain.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        assert model.foundation.moe is not None
        moved = decoder.update_balance(balance, stats, rate=model.foundation.moe.bias_rate)
        losses = {kind: mean.value() for kind, mean in terms.items()}
        return state.apply(tx, grads).replace(extra={"balance": moved}), losses

    return step


def optimizer(rate: float, steps: int) -> optim.Transform:
    """Muon on the matrices of layers, AdamW on all else; encoders get `_READERS` of the rate.

    `rate` is best high: with a third of 0.01, 160 steps are too few to find written needles.
    """
    groups = {}
    for part, peak in (("encoders", _READERS * rate), ("foundation", rate)):
        schedule = _schedule(peak, steps)
        groups[f"{part}, matrices"] = optim.muon(schedule, weight_decay=0.02, adjust="match_rms_adamw", ns_dtype=None)
        groups[f"{part}, others"] = optim.adamw(schedule, b2=0.98, weight_decay=0.02)
    paths = [
        (f"{part}.{below}", f"{part}, {group}")
        for part in ("encoders", "foundation")
        for below, group in (("**.layers.*.**.w_*", "matrices"), ("**", "others"))
    ]
    by_path = optim.multi_transform(groups, paths)
    return optim.chain(optim.clip_by_global_norm(1.0), optim.skip_nonfinite(by_path))


def _schedule(peak: float, steps: int) -> optim.Schedule:
    """A rise of at most 40 steps, the peak, and a fall in the last third."""
    rise, fall = min(40, steps // 5), steps // 3
    stable = steps - rise - fall
    return optim.wsd(peak, warmup_steps=rise, stable_steps=stable, decay_steps=fall + 1, floor=peak / 20)
