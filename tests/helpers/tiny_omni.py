"""A small omni model, and documents for it, shared by the tests of omni, packing and generation."""

import numpy as np

from ftrain.modules import audio_encoder, image_decoder, vision_encoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.audio_encoder import AudioConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.image_decoder import ImageDecoderConfig
from ftrain.modules.moe import MoEConfig
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Document, Media, Target, Text
from ftrain.modules.vision_encoder import VisionConfig
from ftrain.modules.vq_image import VqConfig

D = 24
IMAGE = VisionConfig(d_model=16, layers=1, heads=2, d_out=D, patch=2, channels=1, merge=2)
VIDEO = VisionConfig(d_model=16, layers=1, heads=2, d_out=D, patch=2, channels=1, merge=2, frames=2)
AUDIO = AudioConfig(d_model=16, layers=1, heads=2, d_out=D, rate=8000, n_fft=128, hop=40, mels=10, merge=2)
DRAW = ImageDecoderConfig(VqConfig(size=8, channels=1, widths=(8, 8, 8), codes=8, d_code=4, groups=4), d_model=D)
FOUNDATION = DecoderConfig(
    vocab=40,
    d_model=D,
    layers=2,
    attention=AttentionConfig(D, heads=2, kv_heads=1, head_dim=12),
    moe=MoEConfig(D, 16, experts=4, top_k=2, shared_experts=1),
)
MODEL = OmniModel(
    FOUNDATION,
    encoders={
        "image": vision_encoder.encoder(IMAGE, begin=30, end=31),
        "video": vision_encoder.encoder(VIDEO, begin=32, end=33),
        "audio": audio_encoder.encoder(AUDIO, begin=34, end=35),
    },
    decoders={"draw": image_decoder.decoder(DRAW, begin=36, end=37)},
)


def image(seed: int, height: int = 8, width: int = 8) -> Media:
    pixels = np.random.default_rng(seed).normal(size=(height, width, 1))
    return Media("image", vision_encoder.patchify(pixels, cfg=IMAGE))


def video(seed: int) -> Media:
    pixels = np.random.default_rng(seed).normal(size=(3, 8, 4, 1))
    return Media("video", vision_encoder.patchify(pixels, cfg=VIDEO))


def audio(seed: int, samples: int = 700) -> Media:
    wave = np.random.default_rng(seed).normal(size=samples)
    return Media("audio", audio_encoder.clip_features(wave, cfg=AUDIO))


def drawing(seed: int) -> Target:
    return Target("draw", np.random.default_rng(seed).normal(size=(1, 8, 8)).astype(np.float32))


def documents() -> list[Document]:
    """One of each task, of different lengths."""
    return [
        [Text([1, 2]), image(0), Text([3, 4, 5], train=True)],
        [audio(1), Text([6], train=True)],
        [Text([7, 8, 9, 10], train=True)],
        [Text([11]), drawing(2)],
        [image(3, 12, 5), video(4), Text([12, 13], train=True), drawing(5), Text([14], train=True)],
    ]
