"""`ftrain params` of published configurations, from the file alone.

The totals are those of transformers' modules on the meta device: `sum(p.numel() for p in model.parameters())` of
`AutoModelForImageTextToText.from_config(config)` within `torch.device("meta")`.
"""

import json

import pytest

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
    ],
    ids=["Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen2-VL-72B", "Qwen2.5-VL-7B", "Qwen3-VL-8B", "Qwen3-VL-235B-A22B"],
)
def test_totals_are_those_of_transformers(config, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(ParamsOptions(tmp_path)) == 0
    assert " ".join(capsys.readouterr().out.split()).endswith(said)


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config.json is missing"):
        run(ParamsOptions(tmp_path))
