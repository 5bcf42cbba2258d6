"""Tiny published models whose parts a composed model is made of, as folders; all of random weights."""

from pathlib import Path
from typing import Any

import torch

from tests.helpers import tiny_thinkers
from tests.helpers.text_families import saved

HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def foundation(kind: str, folder: Path, *, words: list[str]) -> Any:
    """Llama ("llama") or Qwen3-MoE ("qwen3_moe") with a tokenizer of `words`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    fields = {**HEADS, "vocab_size": len(words), "intermediate_size": 48, "pad_token_id": None}
    if kind == "llama":
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        made = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**fields, **experts))
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    saved(_random(made), folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)
    return made


def pictures(folder: Path) -> Any:
    """The thinker of Qwen2.5-Omni: patches of 2 x 2 pixels, windows of 8 x 8."""
    make, config = tiny_thinkers.qwen2_5()
    made = _random(make(config))
    saved(made, folder)
    return made


def sounds(folder: Path) -> Any:
    """Whisper with windows of a second."""
    import transformers

    fields = {
        "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 20,
        "max_source_positions": 50, "decoder_layers": 1, "decoder_attention_heads": 2, "vocab_size": 9,
        "pad_token_id": 0, "decoder_ffn_dim": 8,
    }  # fmt: skip
    made = _random(transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**fields)))
    saved(made, folder)
    return made


def tokenizer(folder: Path, *, norm_type: str = "spatial", **fields: Any) -> Any:
    """MoVQGAN of diffusers, or with `norm_type` "group" VQGAN, which halves pictures once."""
    from diffusers import VQModel

    given = {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), "block_out_channels": (32, 64),
        "layers_per_block": 1, "latent_channels": 4, "num_vq_embeddings": 12, "vq_embed_dim": 4,
    }  # fmt: skip
    made = _random(VQModel(norm_type=norm_type, **{**given, **fields}))
    made.save_pretrained(folder)
    return made


def _random(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.copy_(float("norm" in name) * 0.5 + torch.randn(leaf.shape, generator=generator) * 0.1)
    return model.eval()
