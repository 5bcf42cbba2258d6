"""Qwen3-Omni's Code2Wav equals transformers': waves, in chunks too, gradients and files."""

import pytest
import torch

from ftrain.modules import spec
from ftrain.modules.families import qwen3_omni_code2wav as family
from tests.helpers import talking_families as laws

transformers = pytest.importorskip("transformers", minversion="5.24")

SIZES = {
    "codebook_size": laws.CODES,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "sliding_window": 4,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_quantizers": laws.GROUPS,
    "upsample_rates": [3, 2],
    "upsampling_ratios": [2],
    "decoder_dim": 16,
}


def random_model(seed=0, **changes):
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as theirs

    return laws.random_model(theirs.Qwen3OmniMoeCode2Wav, configuration(**changes), seed)


def configuration(**changes):
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeCode2WavConfig

    return Qwen3OmniMoeCode2WavConfig(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("seed", "changes", "frames"),
    [(0, {}, 11), (1, {"upsampling_ratios": [2, 2], "upsample_rates": [2], "num_key_value_heads": 1}, 3)],
)
def test_waves_and_gradients_are_those_of_transformers(seed, changes, frames, tmp_path):
    model = random_model(seed, **changes)
    cfg, params, names, folder = laws.as_ours(model, tmp_path / "weights", family, told=False)
    laws.require_saved_as_it_was(params, names, folder, tmp_path / "again")
    codes_BTQ = torch.randint(0, laws.CODES, (2, frames, laws.GROUPS), generator=torch.Generator().manual_seed(seed))
    wanted = model(codes_BTQ.mT)
    torch.testing.assert_close(family.apply(params, codes_BTQ, cfg), wanted[:, 0], rtol=0, atol=1e-4)
    in_chunks = model.chunked_decode(codes_BTQ[:1].mT, chunk_size=4, left_context_size=3)[0, 0]
    torch.testing.assert_close(
        family.decode(params, codes_BTQ[0], cfg, chunk=4, context=3), in_chunks, rtol=0, atol=1e-4
    )
    wanted.square().mean().backward()
    grads = torch.func.grad(lambda p: family.apply(p, codes_BTQ, cfg).square().mean())(params)
    gradients = laws.gradients_of(model, tmp_path / "gradients", family.specs(cfg), names)
    laws.require_equal_gradients(grads, gradients, within=2e-4)


def test_a_sample_depends_on_no_later_frame(tmp_path):
    cfg, params, _, _ = laws.as_ours(random_model(), tmp_path, family, told=False)
    codes_BTQ = torch.randint(0, laws.CODES, (1, 9, laws.GROUPS), generator=torch.Generator().manual_seed(5))
    whole, part = family.apply(params, codes_BTQ, cfg), family.apply(params, codes_BTQ[:, :6], cfg)
    torch.testing.assert_close(whole[:, : part.shape[1]], part, rtol=0, atol=1e-5)


def test_the_published_model_is_as_large_as_transformers_builds_it():
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as theirs

    given = theirs.Qwen3OmniMoeCode2Wav.config_class()
    with torch.device("meta"):
        model = theirs.Qwen3OmniMoeCode2Wav._from_config(given)
    assert spec.count(family.specs(family.config(given.to_dict()))) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"decoder_dim": 18}, "18 channels cannot be halved 2 times"),
        ({"upsample_rates": []}, "upsample_rates="),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        family.config({**SIZES, **changes})


def test_codes_that_are_none_are_refused(tmp_path):
    cfg, params, _, _ = laws.as_ours(random_model(), tmp_path, family, told=False)
    codes_BTQ = torch.zeros(1, 3, laws.GROUPS, dtype=torch.int64)
    for wrong, message in (
        (codes_BTQ[..., 1:], "all codes of each frame"),
        (codes_BTQ.float(), "torch.float32"),
        (codes_BTQ + laws.CODES, "0 to 11"),
        (codes_BTQ - 1, "0 to 11"),
    ):
        with pytest.raises(ValueError, match=message):
            family.decode(params, wrong[0], cfg)
    with pytest.raises(ValueError, match="0 frames"):
        family.decode(params, codes_BTQ[0, :0], cfg)
