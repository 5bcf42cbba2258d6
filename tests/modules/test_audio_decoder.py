"""Sounds out of a foundation: their codes are learnt, generated, and become mel frames; the tokenizer stays."""

import numpy as np
import torch

from ftrain.kernels import random
from ftrain.modules import audio_decoder, omni, spec, vq_audio
from ftrain.modules.generation import generate_codes
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Target, Text, exact_budget, pack
from ftrain.modules.vq_audio import VqAudioConfig
from tests.helpers import tiny_omni

VQ = VqAudioConfig(frames=8, mels=5, span=4, codes=8, d_code=4, depth=2)
MODEL = OmniModel(tiny_omni.FOUNDATION, {}, {"audio": audio_decoder.decoder(VQ, tiny_omni.D, begin=36, end=37)})


def clip(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(8, 5)).astype(np.float32)


def test_its_loss_is_over_codes_and_leaves_the_tokenizer_without_gradient() -> None:
    documents = [[Text([seed + 1]), Target("audio", clip(seed))] for seed in range(3)]
    batch = pack(documents, budget=exact_budget(documents, model=MODEL), model=MODEL).batch
    params = spec.init(omni.specs(MODEL), random.key(0))

    def loss(params):
        return omni.loss_terms(params, batch, model=MODEL)[0]["audio"].value()

    grads = torch.func.grad(loss)(params)["decoders"]["audio"]
    assert 0.5 < loss(params).item() / np.log(VQ.vocabulary) < 2
    assert grads["head_DC"].any()
    assert not any(leaf.any() for leaf in grads["tokenizer"].values())
    assert not omni.trainable(MODEL)["decoders"]["audio"]["tokenizer"]["codebooks_QKZ"]


def test_generated_codes_become_mel_frames() -> None:
    params = spec.init(omni.specs(MODEL), random.key(0))
    codes_BN = generate_codes(params, [[Text([5])], [Text([6, 7])]], model=MODEL, decoder="audio")
    assert codes_BN.shape == (2, VQ.codes_per_clip)
    tokenizer = params["decoders"]["audio"]
    made = MODEL.decoder("audio").lm_generate(tokenizer, codes_BN)
    assert torch.equal(made, vq_audio.decode(tokenizer["tokenizer"], codes_BN, cfg=VQ))
    assert made.shape == (2, 8, 5)
