"""The omni-modal sparse-MoE model of the experiment, in several sizes, and how much data each is trained on."""

from dataclasses import dataclass

from experiments.omni import corpus
from experiments.omni.corpus import CorpusConfig
from experiments.omni.language import Tokenizer
from experiments.omni.sources import Readers
from ftrain.modules import audio_decoder, audio_encoder, image_decoder, vision_encoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.audio_encoder import CONV_STRIDE, AudioConfig
from ftrain.modules.decoder import DecoderConfig, preset
from ftrain.modules.image_decoder import ImageDecoderConfig
from ftrain.modules.moe import MoEConfig
from ftrain.modules.omni import OmniModel
from ftrain.modules.vision_encoder import VisionConfig
from ftrain.modules.vq_audio import VqAudioConfig
from ftrain.modules.vq_image import VqConfig

IMAGE_SIZE = 8
_HOP = 128  # samples between mel frames
_SPAN = 8  # mel frames to a code: 93 ms
_INIT_STD = 0.3  # rows of text as large as rows of media: with 0.02, all tasks but one stay at chance 200 steps longer


@dataclass(frozen=True)
class Data:
    """What is made to train on: `copies` bent versions of each handwritten digit, and the spoken words of `speech`.

    `graded` bent versions are what the judge of drawings is trained on.
    """

    copies: int
    speech: CorpusConfig
    graded: int = 3


@dataclass(frozen=True)
class Size:
    """Widths of the foundation and of the encoders; `documents` are those of a training batch, and `data` what they are
    drawn from: a larger model has both larger.

    "smoke" has one layer of each kind, and a sixteenth of the spoken words: it shows in a minute that all parts run,
    and learns little.
    """

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    experts: int
    d_expert: int
    vision_width: int
    audio_width: int
    encoder_layers: int
    documents: int
    data: Data


SIZES = {
    "smoke": Size(32, 1, 2, 1, 4, 32, 32, 32, 1, 32, Data(0, corpus.FEW, graded=0)),
    "tiny": Size(96, 3, 4, 2, 8, 96, 64, 64, 2, 160, Data(16, CorpusConfig())),
    "small": Size(256, 6, 8, 4, 16, 256, 192, 128, 4, 256, Data(32, CorpusConfig(train_takes=6))),
    "medium": Size(768, 12, 12, 4, 32, 512, 384, 384, 8, 1024, Data(64, CorpusConfig(train_takes=14))),
}
NAMES = (*SIZES, "30b-a3b")


def parts(size: str) -> Size:
    """The sizes of everything but the foundation; those of "medium" for "30b-a3b"."""
    return SIZES.get(size, SIZES["medium"])


def foundation(size: str, vocab: int) -> DecoderConfig:
    """The sparse-MoE decoder: top-2 experts and one shared, balanced without a loss; or Qwen3-30B-A3B's shape."""
    if size == "30b-a3b":
        big = preset(size)
        return DecoderConfig(vocab=max(vocab, big.vocab), d_model=big.d_model, layers=big.layers,
                             attention=big.attention, moe=big.moe)  # fmt: skip
    s = SIZES[size]
    heads = AttentionConfig(s.d_model, heads=s.heads, kv_heads=s.kv_heads, head_dim=s.d_model // s.heads, qk_norm=True)
    experts = MoEConfig(
        s.d_model, s.d_expert, experts=s.experts, top_k=2, shared_experts=1, score="sigmoid", balance="bias"
    )
    return DecoderConfig(
        vocab=vocab, d_model=s.d_model, layers=s.layers, attention=heads, moe=experts, init_std=_INIT_STD
    )


def vq_config(size: str) -> VqConfig:
    """The tokenizer of 8x8 digits: a 2x2 grid of codes, coarse, then of what they leave over.

    The coarse codes know the digit (1.2 to 1.6 of the 2.3 nats each), so that drawing it is learnt from few examples.
    """
    widths = {"smoke": (8, 8, 8), "tiny": (16, 32, 32)}.get(size, (32, 64, 64))
    return VqConfig(IMAGE_SIZE, channels=1, widths=widths, codes=64, d_code=16, depth=2, normalise=False)


def vq_audio_config(size: str) -> VqAudioConfig:
    """The tokenizer of spoken words: seven places in time, coarse to fine.

    The coarsest codes of a clip say which word it is, the others how it sounds.
    """
    frames, mels = corpus.SAMPLES // _HOP, audio_config(size, 1).mels
    codes = {"smoke": 16, "tiny": 128}.get(size, 256)
    return VqAudioConfig(frames, mels, span=_SPAN, codes=codes, depth=2 if size == "smoke" else 4)


def image_config(size: str, d_out: int) -> VisionConfig:
    """Images: patches of 4x4 pixels, four of which make a token: a digit is one token."""
    s = parts(size)
    return VisionConfig(s.vision_width, s.encoder_layers, heads=4, d_out=d_out, patch=4, channels=1, merge=2)


def video_config(size: str, d_out: int) -> VisionConfig:
    """Videos: patches of 3x3 pixels and three frames, sixteen of which make a token: a film is one token."""
    s = parts(size)
    return VisionConfig(s.vision_width, s.encoder_layers, heads=4, d_out=d_out, patch=3, channels=1, frames=3, merge=4)


def audio_config(size: str, d_out: int) -> AudioConfig:
    """Spoken words: 40 mel bands every 12 ms; a clip is one token."""
    s = parts(size)
    return AudioConfig(
        s.audio_width,
        s.encoder_layers,
        heads=4,
        d_out=d_out,
        rate=corpus.RATE,
        n_fft=256,
        hop=_HOP,
        mels=40,
        merge=corpus.SAMPLES // _HOP // CONV_STRIDE,
    )


def readers(size: str) -> Readers:
    """The encoders' configurations, from which the data makes its features. ValueError for an unknown size."""
    if size not in NAMES:
        raise ValueError(f"--size {size!r} is not one of {', '.join(NAMES)}")
    d_out = width(size)
    return Readers(image_config(size, d_out), video_config(size, d_out), audio_config(size, d_out))


def omni_model(size: str, words: Tokenizer, *, audio: bool) -> OmniModel:
    """Foundation, encoders and decoders of a size; without `audio` it neither hears nor speaks."""
    base, configs = foundation(size, len(words)), readers(size)

    def marks(name: str) -> dict[str, int]:
        return {"begin": words.id(f"<{name}>"), "end": words.id(f"</{name}>")}

    encoders = {
        "image": vision_encoder.encoder(configs.image, **marks("image")),
        "video": vision_encoder.encoder(configs.video, **marks("video")),
    }
    images = ImageDecoderConfig(vq=vq_config(size), d_model=base.d_model, init_std=base.init_std)
    decoders = {"image": image_decoder.decoder(images, **marks("image_out"))}
    if audio and configs.audio is not None:
        encoders["audio"] = audio_encoder.encoder(configs.audio, **marks("audio"))
        decoders["audio"] = audio_decoder.decoder(
            vq_audio_config(size), base.d_model, init_std=base.init_std, **marks("audio_out")
        )
    return OmniModel(base, encoders, decoders)


def width(size: str) -> int:
    """The foundation's width."""
    return SIZES[size].d_model if size in SIZES else preset(size).d_model
