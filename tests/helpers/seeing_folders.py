"""Tiny vision-language models of transformers as folders: a tokenizer of bytes, a chat template, a processor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% elif p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif p['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    "<|end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = {
    "vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 512,
}  # fmt: skip
EYES = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4, "depth": 2}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
PIXELS = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}


def byte_tokenizer(template: str = TEMPLATE, special: tuple[str, ...] = SPECIAL, end: str = "<|im_end|>") -> Any:
    """A token for each byte, and the special ones behind them; the first pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    words.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=end, pad_token=special[0], additional_special_tokens=list(special)
    )
    made.chat_template = template
    return made


def qwen_config(kind: str, tokenizer: Any, *, layers: int = 2) -> Any:
    """The configuration of a tiny model: "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5" or
    "qwen3_5_moe".
    """
    import transformers

    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    texts = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in zip(names, texts, strict=True)}
    words = {**WORDS, "rope_parameters": ROPE, "num_hidden_layers": layers}
    if kind == "qwen2_vl":
        eyes = {"embed_dim": 16, "hidden_size": 32, "num_heads": 2, "depth": 2, "patch_size": 4, "mlp_ratio": 2}
        return transformers.Qwen2VLConfig(text_config=words, vision_config=eyes, **ids)
    if kind == "qwen2_5_vl":
        eyes = {**EYES, "fullatt_block_indexes": [1], "window_size": 16, "out_hidden_size": 32}
        return transformers.Qwen2_5_VLConfig(text_config=words, vision_config=eyes, **ids)
    eyes = {**EYES, "num_position_embeddings": 16, "out_hidden_size": 32}
    if kind.startswith("qwen3_5"):
        return _hybrid_config(kind, words, eyes, ids)
    eyes["deepstack_visual_indexes"] = [0]
    if kind == "qwen3_vl":
        return transformers.Qwen3VLConfig(text_config={**words, "head_dim": 8}, vision_config=eyes, **ids)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return transformers.Qwen3VLMoeConfig(text_config={**words, "head_dim": 8, **experts}, vision_config=eyes, **ids)


def _hybrid_config(kind: str, words: dict[str, Any], eyes: dict[str, Any], ids: dict[str, int]) -> Any:
    """Of Qwen3.5: layers of delta nets and of attention, with an MLP or with experts."""
    import transformers

    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    words |= {**heads, "linear_value_head_dim": 8, "head_dim": 16, "full_attention_interval": 2}
    words["rope_parameters"] = {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    if kind == "qwen3_5":
        return transformers.Qwen3_5Config(text_config=words, vision_config=eyes, **ids)
    del words["intermediate_size"]
    words |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    words["shared_expert_intermediate_size"] = 16
    return transformers.Qwen3_5MoeConfig(text_config=words, vision_config=eyes, **ids)


def write_qwen(
    folder: Path, kind: str = "qwen2_5_vl", *, seed: int = 0, most_pixels: int = 64 * 64, layers: int = 2
) -> Path:
    """A folder of random weights from the seed, whose pictures have 16 x 16 to `most_pixels` pixels."""
    import transformers

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    auto = transformers.AutoModelForImageTextToText
    auto.from_config(qwen_config(kind, tokenizer, layers=layers)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 16 * 16, "longest_edge": most_pixels}
    transformers.Qwen2VLImageProcessorPil(**PIXELS, size=size).save_pretrained(folder)
    means = [0.5] * 3 if kind.startswith("qwen3") else [0.48145466, 0.4578275, 0.40821073]
    films = {**PIXELS, "size": {**size, "longest_edge": 4 * most_pixels}, "fps": 2, "image_mean": means}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(films))
    return folder


def write_pictures(folder: Path, sizes: list[tuple[int, int]], *, seed: int = 0) -> list[str]:
    """PNG files of noise, of these heights and widths; their names."""
    from PIL import Image

    random = np.random.default_rng(seed)
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(len(sizes))]


def seen_chats(names: list[str], *, plain: int = 0) -> list[dict[str, Any]]:
    """Chats about one picture each, and so many without."""
    texts: list[Any] = [
        [{"type": "image", "image": name}, {"type": "text", "text": f"what is {i}?"}] for i, name in enumerate(names)
    ]
    texts += [f"and {i}?" for i in range(plain)]
    answers = [f"it is {i}" + "." * (i % 5) for i in range(len(texts))]
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
        for text, answer in zip(texts, answers, strict=True)
    ]


TILE_MARKS = {"llava": "<image>", "gemma3": "<start_of_image>", "internvl": "<IMG_CONTEXT>", "smolvlm": "<image>"}
"""What the chat template of a family of tiles writes for a picture."""
TILE_TOKENS = (
    *SPECIAL, "<image>", "<start_of_image>", "<end_of_image>", "<soft>", "<img>", "</img>", "<IMG_CONTEXT>",
    "<fake_token_around_image>", "<global-img>", *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)),
)  # fmt: skip
_TILE_EYES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def tile_config(kind: str, tokenizer: Any) -> Any:
    """The configuration of a tiny model whose pictures are tiles of 16 x 16 pixels: "llava", "gemma3", "internvl" or
    "smolvlm"."""
    import transformers as of

    words = {**WORDS, "vocab_size": 288, "num_hidden_layers": 1}
    eyes = {**_TILE_EYES, "num_image_tokens": 16}
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in TILE_TOKENS}
    if kind == "llava":
        return of.LlavaConfig(
            text_config=of.LlamaConfig(**words), image_token_index=ids["<image>"],
            vision_feature_select_strategy="full", vision_config=of.SiglipVisionConfig(**_TILE_EYES),
        )  # fmt: skip
    if kind == "gemma3":
        text = of.Gemma3TextConfig(**words, head_dim=8, sliding_window=64, query_pre_attn_scalar=8)
        return of.Gemma3Config(
            text_config=text, vision_config=of.SiglipVisionConfig(**_TILE_EYES, vision_use_head=False),
            mm_tokens_per_image=4, image_token_index=ids["<soft>"], boi_token_index=ids["<start_of_image>"],
            eoi_token_index=ids["<end_of_image>"],
        )  # fmt: skip
    if kind == "internvl":
        sizes = {**_TILE_EYES, "image_size": [16, 16], "patch_size": [4, 4]}
        return of.InternVLConfig(
            text_config=of.Qwen2Config(**words), vision_config=of.InternVLVisionConfig(**sizes),
            image_token_id=ids["<IMG_CONTEXT>"],
        )  # fmt: skip
    del eyes["num_image_tokens"]
    return of.SmolVLMConfig(
        text_config=of.LlamaConfig(**words), vision_config=of.SmolVLMVisionConfig(**eyes), scale_factor=2,
        image_token_id=ids["<image>"],
    )  # fmt: skip


def write_tiles(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """A folder of random weights from the seed."""
    import transformers as of

    mark = TILE_MARKS[kind]
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", mark)
    tokenizer = byte_tokenizer(template, TILE_TOKENS)
    torch.manual_seed(seed)
    of.AutoModelForImageTextToText.from_config(tile_config(kind, tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": 16, "width": 16}
    processor: Any = {
        "llava": lambda: of.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square),
        "gemma3": lambda: of.Gemma3ImageProcessorPil(size=square),
        "internvl": lambda: of.GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=4),
        "smolvlm": lambda: of.SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
    }[kind]()
    processor.save_pretrained(folder)
    return folder
