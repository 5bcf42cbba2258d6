"""Qwen3-VL with experts in the decoder: the router's weights sum to one whatever the file says.

Files have the experts of a layer as two tensors, `[E, D, 2 F]` and `[E, F, D]` as they are published, with the last two
dims swapped where transformers saves a model that it has made itself. Files of others have each expert by itself, as
those of Qwen3-MoE. Source: Qwen team, Qwen3-VL (arXiv 2511.21631).
"""

from dataclasses import replace

from ftrain.modules.decoder_config import DecoderConfig, layer_block, layer_with
from ftrain.modules.families import qwen3_vl
from ftrain.modules.families.vision_language import Shapes, VisionLanguageFamily, decoder_of, text_of
from ftrain.modules.fused_experts import fused_experts_block
from ftrain.modules.hf_fields import Config
from ftrain.modules.hf_names import HfTensor, Names, natural_order
from ftrain.modules.vision_language import VisionLanguageConfig


def config(config: Config) -> VisionLanguageConfig:
    """The model that a `config.json` of Qwen3-VL-MoE describes. ValueError names an entry that it cannot follow."""
    text = decoder_of(
        {**text_of(config), "norm_topk_prob": True},
        like="qwen3_moe",
        missing={"num_key_value_heads": 16},
        rope_base=qwen3_vl.ROPE_BASE,
        interleaved=True,
        sections=qwen3_vl.SECTIONS,
    )
    return VisionLanguageConfig(_with_fused_experts(text), qwen3_vl.media(config))


def _with_fused_experts(text: DecoderConfig) -> DecoderConfig:
    assert text.moe is not None
    mixture = layer_with(text, mlp=fused_experts_block(text.moe))
    layers = (mixture if text.has_experts(i) else layer_block(text, i) for i in range(text.layers))
    return replace(text, pattern=tuple(layers))


def laid(config: Config, cfg: VisionLanguageConfig, shapes: Shapes) -> VisionLanguageConfig:
    """With one tensor for each expert's gate, up and down where a folder's experts lie one by one."""
    del config
    there = f"model.language_model.layers.{cfg.text.dense_layers}.mlp.experts.0.gate_proj.weight"
    return replace(cfg, text=replace(cfg.text, pattern=())) if there in shapes else cfg


def names(cfg: VisionLanguageConfig, shapes: Shapes) -> Names:
    """The tensors of Qwen3-VL-MoE, which lie as those of these shapes do."""
    if not cfg.text.pattern:
        return tuple(sorted(qwen3_vl.parts(cfg), key=natural_order))
    found = [name for name in qwen3_vl.parts(cfg) if name.index is None]  # but for experts one by one
    for i in range(cfg.text.dense_layers, cfg.text.layers):
        there, here = f"model.language_model.layers.{i}.mlp.experts", f"text.layers.{i}.moe"
        swapped = _swapped(cfg.text, shapes.get(f"{there}.gate_up_proj"), shapes.get(f"{there}.down_proj"))
        found.append(HfTensor(f"{there}.gate_up_proj", f"{here}.w_gate_up_EDF", transposed=swapped))
        found.append(HfTensor(f"{there}.down_proj", f"{here}.w_down_EFD", transposed=swapped))
    return tuple(sorted(found, key=natural_order))


def _swapped(cfg: DecoderConfig, gate_up: tuple[int, ...] | None, down: tuple[int, ...] | None) -> bool:
    """Whether the last two dims are swapped; one of the two tensors always tells."""
    assert cfg.moe is not None
    d, e, f = cfg.d_model, cfg.moe.experts, cfg.moe.d_expert
    return (gate_up, down) == ((e, 2 * f, d), (e, d, f)) != ((e, d, 2 * f), (e, f, d))


FAMILY = VisionLanguageFamily(config, names, laid)
