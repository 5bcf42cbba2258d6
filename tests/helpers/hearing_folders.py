"""Tiny thinkers of transformers as folders, with tokenizers of bytes and files of processors; recordings."""

import json
from pathlib import Path

import numpy as np

from tests.helpers import hearing_families as laws
from tests.helpers import talking_models, tiny_thinkers
from tests.helpers.seeing_folders import PIXELS, TEMPLATE, byte_tokenizer

_TEXTS = {
    "image": "<|image_pad|>", "video": "<|video_pad|>", "audio": "<|audio_pad|>", "audio_start": "<|audio_start|>",
    "audio_end": "<|audio_end|>", "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>",
}  # fmt: skip
SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>", *_TEXTS.values())
_HEARS = "{% elif p['type'] == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>{% endif %}{% endfor %}{% endif %}"


def write_thinker(folder: Path, kind: str = "qwen2_5_omni_thinker", *, seed: int = 0) -> Path:
    """A folder of random weights, whose pictures have 16 x 16 to 64 x 64 pixels; "qwen3_omni_moe_thinker" too."""
    template = TEMPLATE.replace("{% endif %}{% endfor %}{% endif %}", _HEARS, 1)
    tokenizer = byte_tokenizer(template, SPECIAL)
    ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in _TEXTS.items()}
    make = tiny_thinkers.qwen2_5 if kind == "qwen2_5_omni_thinker" else tiny_thinkers.qwen3
    eyes = {"patch_size": 4, **({"window_size": 16} if kind == "qwen2_5_omni_thinker" else {})}
    ears = {"max_source_positions": 120, **({"n_window": 50} if kind == "qwen2_5_omni_thinker" else {})}
    words = {"vocab_size": 272, "pad_token_id": 0, "max_position_embeddings": 512}
    made, config = make(eyes=eyes, ears=ears, ids=ids, **words)
    laws.random_model(made, config, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    bands = config.audio_config.num_mel_bins
    told = {**PIXELS, "size": {"shortest_edge": 256, "longest_edge": 4096}, "feature_size": bands, "chunk_length": 9}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


def write_talker(folder: Path, *, seed: int = 0) -> Path:
    """A folder of a whole Qwen3-Omni of random weights, whose roles are tokens; its voices are ethan and chelsie."""
    from transformers import Qwen3OmniMoeForConditionalGeneration

    template = TEMPLATE.replace("{% endif %}{% endfor %}{% endif %}", _HEARS, 1)
    tokenizer = byte_tokenizer(template, (*SPECIAL, "<|tts_bos|>", "<|tts_eos|>", "<|tts_pad|>"))
    tokenizer.add_tokens(["user", "assistant"])
    ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in _TEXTS.items()}
    config = talking_models.qwen3_omni(words={"vocab_size": 288})
    for name, number in ids.items():
        for one in (config.thinker_config, config.talker_config):
            if hasattr(one, f"{name}_token_id"):
                setattr(one, f"{name}_token_id", number)
    texts = {name: f"<|{name}|>" for name in ("im_start", "im_end", "tts_bos", "tts_eos", "tts_pad")}
    for name, text in {**texts, "user": "user", "assistant": "assistant"}.items():
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(text))
    laws.random_model(Qwen3OmniMoeForConditionalGeneration, config, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    told = {**PIXELS, "patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    told |= {"feature_size": config.thinker_config.audio_config.num_mel_bins, "chunk_length": 9}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


def write_sounds(folder: Path, seconds: list[float], *, rate: int = 16_000, name: str = "sound") -> list[str]:
    """WAV files of noisy tones, of these lengths; their names, which begin with `name`."""
    import soundfile

    random = np.random.default_rng(0)
    for i, length in enumerate(seconds):
        at = np.arange(round(length * rate)) / rate
        wave = 0.4 * np.sin(2 * np.pi * (300 + 200 * i) * at) + 0.05 * random.standard_normal(len(at))
        soundfile.write(folder / f"{name}{i}.wav", wave.astype(np.float32), rate, subtype="FLOAT")
    return [f"{name}{i}.wav" for i in range(len(seconds))]
