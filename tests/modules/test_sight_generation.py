"""Prompts with pictures that cannot be continued are refused; what others get is in the tests of the families."""

import pytest
import torch

from ftrain.kernels import random
from ftrain.modules import spec, vision_language
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.autoregression import generate
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.pictures import MediaConfig
from ftrain.modules.sight_generation import sight_family
from ftrain.modules.vision_language import VisionLanguageConfig
from ftrain.modules.vision_tower import TowerConfig

HEADS = AttentionConfig(8, heads=1, kv_heads=1, head_dim=8, rope_sections=(2, 1, 1))
TEXT = DecoderConfig(vocab=16, d_model=8, layers=1, attention=HEADS, d_hidden=8)
CFG = VisionLanguageConfig(TEXT, MediaConfig(TowerConfig(4, layers=1, heads=1, d_hidden=4, d_out=8), 14, 15))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 is empty"),
        ([[14]], "1 tokens of images"),
        ([{"tokens": torch.ones(2, dtype=torch.int64), "segments": torch.arange(2)}], "one document"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, message):
    params = spec.init(vision_language.specs(CFG), random.key(0))
    with pytest.raises(ValueError, match=message):
        generate(params, prompts, family=sight_family(CFG), max_new=1)
