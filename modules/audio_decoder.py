"""Sounds out of a foundation: it predicts the codes of a VQ tokenizer one after the other, which become mel frames.

How codes enter and leave the foundation is modules/code_decoder.py; the tokenizer is modules/vq_audio.py.
"""

from ftrain.modules import code_decoder, vq_audio
from ftrain.modules.code_decoder import Codec
from ftrain.modules.omni import Decoder, Row
from ftrain.modules.vq_audio import VqAudioConfig


def codec(vq: VqAudioConfig) -> Codec:
    """The tokenizer of log-mel clips float32 `[frames, mels]`."""
    return Codec(
        specs=vq_audio.specs(vq),
        encode=lambda params, mels_BFM: vq_audio.encode(params, mels_BFM, cfg=vq),
        decode=lambda params, codes_BN: vq_audio.decode(params, codes_BN, cfg=vq),
        target=Row((vq.frames, vq.mels), "float32"),
        codes=vq.codes_per_clip,
        vocabulary=vq.vocabulary,
    )


def decoder(vq: VqAudioConfig, d_model: int, *, init_std: float = 0.02, begin: int, end: int) -> Decoder:
    """The modality for `OmniModel`, of a foundation `d_model` wide; `begin` and `end` are token ids. Targets are
    float32 `[frames, mels]`.
    """
    return code_decoder.decoder(codec(vq), d_model, init_std=init_std, begin=begin, end=end)
