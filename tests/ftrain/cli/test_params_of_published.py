"""`ftrain params` of published configurations, from the file alone.

The totals are those of transformers' modules on the meta device: `sum(p.numel() for p in model.parameters())` of
`AutoModelForImageTextToText.from_config(config)`, or of a thinker's class, within `torch.device("meta")`.
"""

import json

import pytest
import torch

from ftrain.cli.params import ParamsOptions, run

EYES = {"depth": 32, "in_chans": 3, "num_heads": 16, "patch_size": 14, "spatial_patch_size": 14}
SECOND = {
    "model_type": "qwen2_vl",
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "use_sliding_window": False,
    "sliding_window": 32768,
}
THIRD = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}


def second(width, hidden, layers, heads, kv_heads, vocab=152064, tied=False):
    """Qwen2-VL, as its first files had it."""
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab}
    heads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    eyes = {**EYES, "embed_dim": 1280, "mlp_ratio": 4, "hidden_size": width}
    return {**SECOND, **sizes, **heads, "vision_config": eyes}


def and_a_half():
    """Qwen2.5-VL-7B."""
    eyes = {**EYES, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "window_size": 112}
    eyes |= {"fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "hidden_act": "silu"}
    return {**second(3584, 18944, 28, 28, 4), "model_type": "qwen2_5_vl", "vision_config": eyes}


def third(kind, **text):
    """Qwen3-VL."""
    eyes = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096}
    eyes |= {"num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24], "patch_size": 16}
    words = {"vocab_size": 151936, "hidden_size": 4096, "head_dim": 128, "rope_theta": 5e6, "rope_scaling": THIRD}
    return {
        "model_type": kind,
        "text_config": {**words, "model_type": f"{kind}_text", "intermediate_size": 12288, **text},
        "vision_config": eyes,
        "tie_word_embeddings": False,
    }


def hybrid(kind, width, **text):
    """Qwen3.5, as transformers' classes have it where nothing is said, with entries of published files."""
    eyes = {**third("qwen3_vl")["vision_config"], "out_hidden_size": width, "deepstack_visual_indexes": []}
    words = {"model_type": f"{kind}_text", "hidden_size": width, "vocab_size": 248320}
    words |= {"attn_output_gate": True, "full_attention_interval": 4}
    words |= {"head_dim": 256, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "num_attention_heads": 16}
    words |= {"rope_parameters": {**THIRD, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}}
    return {"model_type": kind, "text_config": {**words, **text}, "vision_config": eyes, "tie_word_embeddings": False}


def hears(kind, audio, **thinker):
    """The entries of a whole omni model, of which the thinker is counted."""
    audio = {"d_model": 1280, "encoder_layers": 32, "encoder_ffn_dim": 5120, "num_mel_bins": 128, **audio}
    audio |= {"encoder_attention_heads": 20, "activation_function": "gelu", "scale_embedding": False}
    talker = {"talker_config": {"hidden_size": 896}, "enable_audio_output": True}
    return {"model_type": kind, "thinker_config": {**thinker, "audio_config": audio}, **talker}


def second_omni():
    """Qwen2.5-Omni-7B."""
    eyes, rope = and_a_half()["vision_config"], {"type": "default", "rope_type": "default"}
    words = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    words |= {"model_type": "qwen2_5_omni_text"}
    words |= {"num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1e6, "init_std": 0.02}
    words |= {"rope_scaling": {**rope, "mrope_section": [16, 24, 24]}, "sliding_window": 32768, "use_cache": True}
    ids = {"audio_token_index": 151646, "audio_start_token_id": 151647, "seconds_per_chunk": 2, "init_std": 0.02}
    ids |= {"position_id_per_seconds": 25, "vision_token_id": 151654, "tts_text_end_token_id": 151861}
    eyes |= {"embed_dim": 1280, "init_std": 0.02}
    audio = {"n_window": 100, "output_dim": 3584, "init_std": 0.02, "num_hidden_layers": 32}
    return hears("qwen2_5_omni", audio, text_config=words, vision_config=eyes, **ids)


def third_omni():
    """Qwen3-Omni-30B-A3B."""
    words = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    words |= {"model_type": "qwen3_omni_moe_text"}
    words |= {
        "head_dim": 128,
        "vocab_size": 152064,
        "rope_theta": 1e6,
        "use_qk_norm": True,
        "use_sliding_window": False,
    }
    words |= {"rope_scaling": {**THIRD, "interleaved": True}, "shared_expert_intermediate_size": 0, "pruned_heads": {}}
    words |= {**EXPERTS, "moe_intermediate_size": 768, "mlp_only_layers": [], "intermediate_size": 768}
    eyes = {**third("qwen3_vl")["vision_config"], "out_hidden_size": 2048, "image_size": 768, "tokens_per_second": 2}
    eyes |= {"apply_vit_abs_pos_embed": True}
    audio = {"n_window": 50, "n_window_infer": 800, "output_dim": 2048, "downsample_hidden_size": 480}
    audio |= {"conv_chunksize": 500, "max_source_positions": 1500, "num_hidden_layers": 32}
    ids = {"audio_token_id": 151675, "audio_start_token_id": 151669, "position_id_per_seconds": 13, "dtype": "bfloat16"}
    return hears("qwen3_omni_moe", audio, text_config=words, vision_config=eyes, **ids)


EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (second(1536, 8960, 28, 12, 2, vocab=151936, tied=True), "2,208,985,600 parameters"),
        (second(3584, 18944, 28, 28, 4), "8,291,375,616 parameters"),
        (second(8192, 29568, 80, 64, 8), "73,405,560,320 parameters"),
        (and_a_half(), "8,292,166,656 parameters"),
        (
            third("qwen3_vl", num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8),
            "8,767,123,696 parameters",
        ),
        (
            third("qwen3_vl_moe", num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, **EXPERTS),
            "235,670,022,896 parameters, 227,096,395,776 of them in experts; a token uses 22,767,151,856",
        ),
        (
            hybrid("qwen3_5", 4096, num_hidden_layers=32, num_key_value_heads=4, intermediate_size=12288),
            "9,409,813,744 parameters",
        ),
        (
            hybrid("qwen3_5_moe", 2048, num_hidden_layers=40, num_experts=256, moe_intermediate_size=512),
            "35,107,181,936 parameters, 32,212,254,720 of them in experts; a token uses 3,901,560,176",
        ),
        (second_omni(), "8,931,813,888 parameters"),
        (
            third_omni(),
            "31,719,205,488 parameters, 28,991,029,248 of them in experts; a token uses 4,540,115,568",
        ),
    ],
    ids=[
        *("Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen2-VL-72B", "Qwen2.5-VL-7B", "Qwen3-VL-8B", "Qwen3-VL-235B-A22B"),
        *("Qwen3.5-9B", "Qwen3.5-35B-A3B", "Qwen2.5-Omni-7B", "Qwen3-Omni-30B-A3B"),
    ],
)
def test_totals_are_those_of_transformers(config, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(ParamsOptions(tmp_path)) == 0
    assert " ".join(capsys.readouterr().out.split()).endswith(said)


TALKER = {
    "num_code_groups": 16,
    "thinker_hidden_size": 2048,
    "accept_hidden_layer": 24,
    "codec_bos_id": 2149,
    "codec_eos_token_id": 2150,
    "codec_nothink_id": 2155,
    "codec_pad_id": 2148,
    "codec_think_bos_id": 2156,
    "codec_think_eos_id": 2157,
    "speaker_id": {"chelsie": 2301},
    "spatial_merge_size": 2,
    "position_id_per_seconds": 13,
}
STACK = {"hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128, "rope_theta": 1e6}
SPEAKS = {
    "num_hidden_layers": 20,
    "num_key_value_heads": 2,
    "vocab_size": 3072,
    "num_experts": 128,
    "num_experts_per_tok": 6,
}
SPEAKS |= {"moe_intermediate_size": 384, "shared_expert_intermediate_size": 768, "intermediate_size": 2048}
REST = {
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "vocab_size": 2048,
    "intermediate_size": 3072,
    "num_code_groups": 16,
}


def test_a_whole_model_is_counted_with_what_speaks_in_it(tmp_path, capsys):
    """As large as transformers' modules on the meta device."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    talker = {**TALKER, "text_config": {**STACK, **SPEAKS}, "code_predictor_config": {**STACK, **REST}}
    config = {**third_omni(), "talker_config": talker, "code2wav_config": {}}
    with torch.device("meta"):
        wanted = transformers.Qwen3OmniMoeForConditionalGeneration._from_config(
            transformers.Qwen3OmniMoeConfig.from_dict(config)
        )
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(ParamsOptions(tmp_path, whole=True)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{sum(p.numel() for p in wanted.parameters()):,} parameters" in said
    assert "code2wav" in said


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config.json is missing"):
        run(ParamsOptions(tmp_path))
