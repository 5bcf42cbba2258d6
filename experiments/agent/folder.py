"""A tiny Qwen3-VL of random weights as a folder: its tokenizer learns pieces of the trajectories' words."""

import json
from pathlib import Path
from typing import Any

import torch

from experiments.agent.desk import SIDE

MARKS = (
    "<|end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% elif p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = ("user", "assistant", "tool")
PATCH, MERGE = 8, 2  # a cell of the desktop is a token
_MOST = 400  # tokens of text
_INIT, _WORDS = 0.1, 0.5  # standard deviations of weights, and of embeddings


def tokenizer(texts: list[str]) -> Any:
    """Pieces of these texts, down to bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    words.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words.train_from_iterator(
        [*texts, *(f"{role}\n" for role in ROLES for _ in texts)],
        trainers.BpeTrainer(vocab_size=_MOST, initial_alphabet=alphabet, show_progress=False),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token=MARKS[0], additional_special_tokens=list(MARKS)
    )
    made.chat_template = TEMPLATE
    return made


def config(tokens: Any) -> Any:
    """The configuration: 3 layers of 64 channels, a tower of 2 layers of 48."""
    from transformers import Qwen3VLConfig

    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {name: tokens.convert_tokens_to_ids(mark) for name, mark in zip(names, marks, strict=True)}
    text = {
        "vocab_size": len(tokens), "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160, "max_position_embeddings": 4096,
        "pad_token_id": tokens.pad_token_id, "initializer_range": _INIT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10_000.0},
    }  # fmt: skip
    eyes = {
        "hidden_size": 48, "num_heads": 4, "intermediate_size": 128, "depth": 2, "patch_size": PATCH,
        "deepstack_visual_indexes": [0], "num_position_embeddings": (SIDE // PATCH) ** 2, "out_hidden_size": 64,
        "initializer_range": _INIT,
    }  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=eyes, **ids)


def write(folder: Path, texts: list[str], *, seed: int = 0) -> Path:
    """The folder, with weights that the seed draws."""
    import transformers

    tokens = tokenizer(texts)
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config(tokens))
    with torch.no_grad():  # words and places as large as what layers add to them
        model.get_input_embeddings().weight.mul_(_WORDS / _INIT)
        model.model.visual.pos_embed.weight.mul_(_WORDS / _INIT)
        model.model.visual.patch_embed.proj.weight.mul_((3 * 2 * PATCH**2) ** -0.5 / _INIT)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    means = {"image_mean": [0.9] * 3, "image_std": [0.25] * 3}  # of the desktop: paper is nearly nought, icons are not
    transformers.Qwen2VLImageProcessorPil(**sizes, **means, size=size).save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps({**sizes, **means, "size": size, "fps": 2}))
    return folder
