"""Tiny thinkers of transformers: their classes and configurations, of which entries may be others."""

from typing import Any

from tests.helpers import hearing_families as laws
from tests.helpers import seeing_families as seen

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_EYES = {
    "depth": 3, "hidden_size": 8, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 12, "patch_size": 2,
}  # fmt: skip
_EARS = {
    "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 12, "d_model": 8, "output_dim": 16,
    "max_source_positions": 20,
}  # fmt: skip
IDS = {
    "audio": laws.AUDIO, "image": seen.IMAGE, "video": seen.VIDEO, "audio_start": laws.HARK, "audio_end": laws.HUSH,
    "vision_start": seen.START, "vision_end": seen.END,
}  # fmt: skip
"""The tokens of media and around them."""
_EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def qwen2_5(*, ears: Any = None, eyes: Any = None, ids: Any = None, **words: Any) -> tuple[Any, Any]:
    """The thinker of Qwen2.5-Omni, whose chunks have 20 frames; `ears`, `eyes`, `words`: entries of its parts; `ids`:
    in the place of `IDS`.
    """
    import transformers

    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config={**seen.WORDS, "vocab_size": laws.VOCAB, "rope_parameters": _ROPE, **words},
        vision_config={**_EYES, "window_size": 8, "fullatt_block_indexes": [1], **(eyes or {})},
        audio_config={**_EARS, "num_mel_bins": 4, "n_window": 10, **(ears or {})},
        **{f"{kind}_token_{'id' if '_' in kind else 'index'}": token for kind, token in (ids or IDS).items()},
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration, config


def qwen3(*, ears: Any = None, eyes: Any = None, ids: Any = None, **words: Any) -> tuple[Any, Any]:
    """The thinker of Qwen3-Omni, two of whose chunks make a window; arguments as of `qwen2_5`."""
    import transformers

    rope = {**_ROPE, "mrope_interleaved": True}
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config={**seen.WORDS, **_EXPERTS, "vocab_size": laws.VOCAB, "rope_parameters": rope, **words},
        vision_config={**_EYES, "num_position_embeddings": 9, "deepstack_visual_indexes": [2, 0], **(eyes or {})},
        audio_config={**_EARS, "num_mel_bins": 8, "n_window_infer": 200, "downsample_hidden_size": 4, **(ears or {})},
        position_id_per_seconds=13,
        **{f"{kind}_token_id": token for kind, token in (ids or IDS).items()},
    )
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration, config
