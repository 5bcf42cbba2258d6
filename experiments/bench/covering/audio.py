"""Audio encoders of transformers: with a text by CTC, a class for each recording, or features."""

from typing import Any

import torch
from torch import Tensor

from experiments.bench.covering.case import Case
from experiments.bench.covering.rowwise import ROWS, Rows

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_WAVES = {
    **_SIZES, "conv_dim": [8, 8, 8], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 2], "vocab_size": 32,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "pad_token_id": 0,
}  # fmt: skip
_MASKED = {**_WAVES, "apply_spec_augment": False}
_SEW = {**_MASKED, "squeeze_factor": 2}
_STABLE = {**_MASKED, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
_PARAKEET = {**_SIZES, "num_key_value_heads": 2, "num_mel_bins": 16, "subsampling_conv_channels": 8, "layerdrop": 0.0,
             "dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "conv_kernel_size": 3,
             "max_position_embeddings": 64}  # fmt: skip
_WHISPER = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8,
            "max_source_positions": 20}  # fmt: skip


def cases() -> tuple[Case, ...]:
    """A row for each family, and one for the second task of some."""
    return tuple(Case("audio", name, row.build) for name, row in _rows().items())


def _rows() -> dict[str, Rows]:
    texts: dict[str, dict[str, Any]] = {
        "wav2vec2": _MASKED,
        "hubert": _MASKED,
        "wavlm": _MASKED,
        "unispeech": _MASKED,
        "unispeech-sat": _MASKED,
        "data2vec-audio": _WAVES,
        "sew": _SEW,
        "sew-d": {**_SEW, "position_buckets": 8, "max_position_embeddings": 64},
        "wav2vec2-conformer": {**_MASKED, "conv_depthwise_kernel_size": 3, "max_source_positions": 200},
    }
    found = {kind: Rows(kind, "ctc", waves, options) for kind, options in texts.items()}
    found["wav2vec2 stable"] = Rows("wav2vec2", "ctc", waves, _STABLE)
    found["wav2vec2 adapters (MMS)"] = Rows("wav2vec2", "ctc", waves, {**_STABLE, "adapter_attn_dim": 4})
    found["wav2vec2 masked rows"] = Rows("wav2vec2", "ctc", masked_waves, _STABLE)
    found["wav2vec2-bert"] = Rows(
        "wav2vec2-bert",
        "ctc",
        lambda generator: {"input_features": torch.randn(ROWS, 24, 12, generator=generator)},
        {**_SIZES, "feature_projection_input_dim": 12, "apply_spec_augment": False, "vocab_size": 32,
         "conv_depthwise_kernel_size": 3},
    )  # fmt: skip
    found["parakeet_ctc"] = Rows(
        "parakeet_ctc", "ctc", frames, {"vocab_size": 32, "pad_token_id": 31, "encoder_config": _PARAKEET}
    )
    found["lasr_ctc"] = Rows("lasr_ctc", "ctc", frames, {"vocab_size": 32, "encoder_config": _PARAKEET})
    for kind in ("wav2vec2", "hubert", "wavlm", "unispeech-sat", "data2vec-audio"):
        options = _WAVES if kind.startswith("data2vec") else _MASKED
        found[f"{kind} classes"] = Rows(kind, "audio_classification", waves, options)
    found["audio-spectrogram-transformer"] = Rows(
        "audio-spectrogram-transformer",
        "audio_classification",
        lambda generator: {"input_values": torch.randn(ROWS, 32, 16, generator=generator)},
        {**_SIZES, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16},
    )
    found["whisper"] = Rows("whisper", "audio_classification", bands, {**_WHISPER, "classifier_proj_size": 8})
    found["qwen2_audio_encoder"] = Rows("qwen2_audio_encoder", "features", bands, _WHISPER)
    found["parakeet_encoder"] = Rows("parakeet_encoder", "features", frames, _PARAKEET)
    return found


def waves(generator: torch.Generator) -> dict[str, Tensor]:
    """Noise as recordings, `[B, samples]`."""
    return {"input_values": torch.randn(ROWS, 400, generator=generator)}


def masked_waves(generator: torch.Generator) -> dict[str, Tensor]:
    """Recordings of several lengths, filled up."""
    lengths = torch.tensor([400, 350, 400, 300])
    mask = (torch.arange(400) < lengths[:, None]).long()
    return {"input_values": waves(generator)["input_values"] * mask, "attention_mask": mask}


def frames(generator: torch.Generator) -> dict[str, Tensor]:
    """Noise as spectra, `[B, frames, bands]`."""
    return {"input_features": torch.randn(ROWS, 80, 16, generator=generator)}


def bands(generator: torch.Generator) -> dict[str, Tensor]:
    """Noise as spectra, `[B, bands, frames]`."""
    return {"input_features": torch.randn(ROWS, 8, 40, generator=generator)}
