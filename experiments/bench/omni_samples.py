"""Small models that see and hear of random weights, and samples of any size for them, as both sides read them.

A sample is the raw leaves of one document (`ftrain.modules.vision_media.prepare`), with labels where an answer follows.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ftrain.data.even_packs import even_plan
from ftrain.data.packing import plan_packs
from ftrain.modules.families.registry import SEEING
from ftrain.modules.pictures import MediaConfig

Kind = Literal["qwen2.5-vl", "qwen3-vl-moe", "qwen3-omni"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_VOCAB = 4096
_IDS = {"image_token_id": 4090, "video_token_id": 4091, "vision_start_token_id": 4092, "vision_end_token_id": 4093}
_EARS = {"audio_token_id": 4087, "audio_start_token_id": 4088, "audio_end_token_id": 4089}
_NO_LABEL = -100
_WAITING = 3  # times as many tokens as the packs hold
_TEXT = (60.0, 0.8)  # median and deviation of the logarithm
_KINDS = (0.3, 0.4, 0.3)  # of samples: text alone, pictures, a film
_SOUND = 0.5  # of samples for a model that hears
_CHUNK = 100  # frames of sound; clips are of whole ones, of which transformers does not change the last for its batch


def config(kind: Kind, *, quick: bool = False) -> Any:
    """transformers' configuration of a small model."""
    import transformers

    size = 1 if quick else 4
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 4, 4]}
    words: dict[str, Any] = {
        "vocab_size": _VOCAB, "hidden_size": 96 * size, "intermediate_size": 256 * size, "num_hidden_layers": 1 + size,
        "num_attention_heads": 3 * size, "num_key_value_heads": size, "max_position_embeddings": 8192,
        "rope_parameters": rope, "tie_word_embeddings": False,
    }  # fmt: skip
    eyes: dict[str, Any] = {
        "depth": 1 + size, "hidden_size": 64 * size, "out_hidden_size": 96 * size, "num_heads": size,
        "intermediate_size": 160 * size,
    }  # fmt: skip
    if kind == "qwen2.5-vl":
        eyes |= {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 112, "tokens_per_second": 2}
        return transformers.Qwen2_5_VLConfig(text_config=words, vision_config=eyes, tie_word_embeddings=False, **_IDS)
    words |= {
        "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 80 * size,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_parameters": {**rope, "mrope_interleaved": True},
    }  # fmt: skip
    eyes |= {"patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
    if kind == "qwen3-omni":
        ears = {
            "encoder_layers": 1 + size, "encoder_attention_heads": size, "encoder_ffn_dim": 160 * size,
            "d_model": 64 * size, "output_dim": 96 * size, "num_mel_bins": 64, "n_window": _CHUNK // 2,
            "n_window_infer": 4 * _CHUNK, "downsample_hidden_size": 16 * size, "max_source_positions": 100,
        }  # fmt: skip
        return transformers.Qwen3OmniMoeThinkerConfig(
            text_config=words, vision_config=eyes, audio_config=ears, position_id_per_seconds=13, **_IDS, **_EARS
        )
    return transformers.Qwen3VLMoeConfig(text_config=words, vision_config=eyes, tie_word_embeddings=False, **_IDS)


def model(kind: Kind, *, quick: bool = False) -> Any:
    """The same as a module in float32 with eager attention and random weights."""
    import transformers

    torch.manual_seed(0)
    said = config(kind, quick=quick)
    if kind == "qwen3-omni":
        thinker: Any = transformers.Qwen3OmniMoeThinkerForConditionalGeneration
        return thinker._from_config(said, attn_implementation="eager").float()
    return transformers.AutoModelForImageTextToText.from_config(said, attn_implementation="eager").float()


def media_of(said: Any) -> MediaConfig:
    """What a model of this configuration asks of its media."""
    found = said.to_dict()
    return SEEING[found["model_type"]].config(found).media


def packs(said: Any, count: int, *, tokens: int, quick: bool = False) -> list[list[dict[str, Tensor]]]:
    """Samples in so many packs of at most `tokens` tokens, as the loader of `ftrain train` plans them: full, and even
    in what there is to see.
    """
    cfg, rng = media_of(said), np.random.default_rng(0)
    drawn, total = list[dict[str, Tensor]](), 0
    while total < _WAITING * tokens * count:
        one = _sample(cfg, rng, largest=4 if quick else 12)
        if len(one["tokens"]) <= tokens:
            drawn.append(one)
            total += len(one["tokens"])
    lengths_N = np.array([len(one["tokens"]) for one in drawn])
    seen_N = np.array([sum(int((one["tokens"] == i).sum()) for i in (cfg.image, cfg.video)) for one in drawn], float)
    first = plan_packs(lengths_N, lengths_N.astype(float), tokens=tokens, packs=count)
    late_N = np.zeros(len(drawn), bool)
    plan = even_plan(first, lengths_N, np.stack([lengths_N.astype(float), seen_N], 1), late_N)
    return [[one for one, own in zip(drawn, plan.pack_N, strict=True) if own == pack] for pack in range(count)]


def _sample(cfg: MediaConfig, rng: np.random.Generator, *, largest: int) -> dict[str, Tensor]:
    """Words, pictures or a film of sides up to `largest` tokens, more words and an answer."""
    question, answer = (int(np.exp(rng.normal(np.log(_TEXT[0]), _TEXT[1])).clip(4, 600)) for _ in range(2))
    kind, merge = rng.choice(3, p=_KINDS), cfg.tower.merge
    alone_in_time = "second_per_grid_ts" if cfg.sound is None else "video_second_per_grid"
    shapes: list[tuple[str, int, int, int]] = []
    if kind == 1:
        shapes = [("image", 1, *rng.integers(2, largest + 1, 2).tolist()) for _ in range(rng.integers(1, 4))]
    elif kind == 2:
        shapes = [("video", int(rng.integers(2, largest + 1)), *rng.integers(2, largest // 2 + 2, 2).tolist())]
    ids, found = rng.integers(3, 4000, question).tolist(), dict[str, list[Tensor]]()
    for what, frames, rows, columns in shapes:
        alone = frames if what == "video" and cfg.split else 1
        for _ in range(alone):
            places = [cfg.id_of(what)] * (frames // alone * rows * columns)
            ids += [_IDS["vision_start_token_id"], *places, _IDS["vision_end_token_id"]]
        pixels = rng.standard_normal((frames * rows * columns * merge**2, cfg.tower.d_patch), np.float32)
        found.setdefault("pixels" if what == "image" else "pixel_values_videos", []).append(torch.from_numpy(pixels))
        grid = torch.tensor([[frames, rows * merge, columns * merge]])
        found.setdefault(f"{what}_grid_thw", []).append(grid)
        if what == "video" and cfg.per_second is not None:
            found.setdefault(alone_in_time, []).append(torch.tensor([1.0]))
    if cfg.sound is not None and rng.random() < _SOUND:
        frames = _CHUNK * int(rng.integers(1, 9))
        heard = [cfg.sound.token] * cfg.sound.tower.tokens_of(frames)
        ids += [_EARS["audio_start_token_id"], *heard, _EARS["audio_end_token_id"]]
        found["sound"] = [torch.from_numpy(rng.standard_normal((frames, cfg.sound.tower.mels), np.float32))]
        found["sound_frames"] = [torch.tensor([frames])]
    tokens = torch.tensor(ids + rng.integers(3, 4000, answer).tolist())
    labels = torch.full_like(tokens, _NO_LABEL)
    labels[len(ids) - 1 : -1] = tokens[len(ids) :]
    return {"tokens": tokens, "labels": labels, **{name: torch.cat(leaves) for name, leaves in found.items()}}


def pack(given: Sequence[dict[str, Tensor]], *, tokens: int) -> dict[str, Tensor]:
    """One raw pack of samples, filled up to `tokens` with another document without labels."""
    rest = tokens - sum(len(one["tokens"]) for one in given)
    if rest:
        zeros = torch.zeros(rest, dtype=torch.int64)
        given = [*given, {"tokens": zeros, "labels": zeros + _NO_LABEL}]
    made = {"segments": torch.repeat_interleave(torch.tensor([len(one["tokens"]) for one in given]))}
    for name in dict.fromkeys(name for one in given for name in one):
        made[name] = torch.cat([one[name] for one in given if name in one])
    return made


def budgets(batches: Sequence[Sequence[dict[str, Tensor]]], *, hears: bool) -> dict[str, int]:
    """Patches, and chunks of sound, that each pack has room for: those of the one with most."""
    names, found = ("pixels", "pixel_values_videos"), dict[str, int]()
    found["patches"] = max(sum(len(one[n]) for one in batch for n in names if n in one) for batch in batches)
    if hears:
        frames = (sum(int(one["sound_frames"].sum()) for one in batch if "sound" in one) for batch in batches)
        found["chunks"] = max(frames) // _CHUNK
    return found


def padded(given: Sequence[dict[str, Tensor]], *, hears: bool) -> dict[str, Any]:
    """The samples as transformers reads them: rows that are filled up to the longest, labels at their own places."""
    length = max(len(one["tokens"]) for one in given)
    filled = {"input_ids": 0, "attention_mask": 0, "labels": _NO_LABEL, "mm_token_type_ids": 0}
    rows: dict[str, Any] = {name: torch.full((len(given), length), fill) for name, fill in filled.items()}
    for number, one in enumerate(given):
        tokens, here = one["tokens"], slice(0, len(one["tokens"]))
        rows["input_ids"][number, here], rows["attention_mask"][number, here] = tokens, 1
        rows["labels"][number, 1 : len(tokens)] = one["labels"][:-1]
        kinds = (tokens == _IDS["image_token_id"]).int() + 2 * (tokens == _IDS["video_token_id"]).int()
        rows["mm_token_type_ids"][number, here] = kinds.to(rows["mm_token_type_ids"].dtype)
    theirs, own = {"pixels": "pixel_values"}, ("tokens", "labels", "sound", "sound_frames")
    for name in dict.fromkeys(name for one in given for name in one if name not in own):
        rows[theirs.get(name, name)] = torch.cat([one[name] for one in given if name in one])
    rows["mm_token_type_ids"] = rows["mm_token_type_ids"].int()
    if hears:
        del rows["mm_token_type_ids"]
    clips = [one["sound"] for one in given if "sound" in one]
    if clips:
        rows["input_features"] = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True).mT
        lengths_n1 = torch.tensor([[len(clip)] for clip in clips])
        rows["feature_attention_mask"] = (torch.arange(int(lengths_n1.max())) < lengths_n1).long()
    return {**rows, "use_cache": False}
