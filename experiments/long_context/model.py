"""The model: layers that see a window, a few that see all, experts in each, and encoders of pictures and sound.

Legend: T tokens, D width, H query heads, G key/value heads, K head dim.
"""

from dataclasses import replace
from math import log

from torch import Tensor

from experiments.long_context.haystack import Sources
from experiments.omni import corpus
from ftrain import optim
from ftrain.modules import attention, audio_encoder, vision_encoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.audio_encoder import CONV_STRIDE, AudioConfig
from ftrain.modules.block import Block, Context
from ftrain.modules.decoder import DecoderConfig, layer_with
from ftrain.modules.layers import attention_block
from ftrain.modules.moe import MoEConfig
from ftrain.modules.omni import OmniModel
from ftrain.modules.vision_encoder import VisionConfig

D_MODEL = 64
WINDOW = 64
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

    The short one joins a name to what stands behind it, which an attention over many tokens learns late.
    """
    heads = AttentionConfig(D_MODEL, heads=4, kv_heads=2, head_dim=D_MODEL // 4, qk_norm=True, window=WINDOW)
    wide = replace(heads, heads=2, kv_heads=1, head_dim=D_MODEL // 2, window=None, rope_base=None)
    experts = MoEConfig(D_MODEL, D_MODEL, experts=8, top_k=2, shared_experts=1, score="sigmoid", balance="bias")
    cfg = DecoderConfig(vocab, D_MODEL, 3, heads, moe=experts, tie_embeddings=True, init_std=0.3)
    short = layer_with(cfg, attention=attention_block(replace(heads, window=_SHORT)))
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


def optimizer(rate: float, steps: int) -> optim.Transform:
    """Muon on the matrices of layers, AdamW on all else, warm-up and cosine."""
    schedule = optim.warmup_cosine(rate, warmup_steps=min(40, steps // 5), total_steps=steps + 1, floor=rate / 20)
    groups = {
        "matrices": optim.muon(schedule, weight_decay=0.02, adjust="match_rms_adamw", ns_dtype=None),
        "others": optim.adamw(schedule, b2=0.98, weight_decay=0.02),
    }
    by_path = optim.multi_transform(groups, [("**.layers.*.**.w_*", "matrices"), ("**", "others")])
    return optim.chain(optim.clip_by_global_norm(1.0), optim.skip_nonfinite(by_path))
