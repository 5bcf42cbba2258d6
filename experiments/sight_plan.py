"""Language models that see, and some that hear, as a search of layouts sees them.

    ftrain plan experiments/sight_plan.py --size qwen2-vl-7b --tokens 192K --gpus 128 --apply plan.json

Half of a pack's tokens are of films, whose frames have 448 x 448 pixels or the nearest that the tower reads, and of
models that hear an eighth of recordings; frames and chunks of sound are dealt to all ranks alike. The towers are
divided over all ranks, and what they read is whole on one (FSDP); the decoder has the layout that is searched for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from experiments.decoder_plan import active_weights
from experiments.planned_step import planned_step
from ftrain import Aval, Precision
from ftrain.bridge.native_sight import NativeSight
from ftrain.kernels.documents import Documents
from ftrain.modules import audio_tower, spec, vision_language, vision_tower
from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.decoder_config import layer_block
from ftrain.modules.families.registry import SEEING
from ftrain.modules.vision_language import VisionLanguageConfig
from ftrain.modules.vision_media import RULES
from ftrain.plan.space import Candidate, ModelShape
from ftrain.plan.workload import WorkloadStep
from ftrain.sharding import Layout

_CPU = torch.device("cpu")
_SEEN, _HEARD = 0.5, 0.125  # of a pack's tokens
_PIXELS = 448  # a side of a frame
_DOCUMENTS = 64  # places for documents in a pack, or for what a rank has of frames and windows, in tokens of them

_QWEN2 = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
_QWEN3 = {
    "rms_norm_eps": 1e-6, "rope_theta": 5e6, "head_dim": 128, "vocab_size": 151_936,
    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
}  # fmt: skip
_QWEN35 = {
    "rms_norm_eps": 1e-6, "head_dim": 256, "vocab_size": 248_320, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}  # fmt: skip


def _decoder(d_model: int, layers: int, heads: int, kv_heads: int, hidden: int, **more: Any) -> dict[str, Any]:
    sizes = (d_model, layers, heads, kv_heads, hidden)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return {**dict(zip(names, sizes, strict=True)), **more}


def _experts(experts: int, hidden: int) -> dict[str, Any]:
    return {
        "num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": hidden, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }  # fmt: skip


_EYES2 = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
_EYES25 = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
}  # fmt: skip
_EYES3 = {
    "depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "patch_size": 16,
    "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip
_EYES35 = {name: said for name, said in _EYES3.items() if name != "deepstack_visual_indexes"}
_EARS = {
    "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "num_mel_bins": 128,
    "n_window": 50, "n_window_infer": 800, "output_dim": 2048, "downsample_hidden_size": 480,
    "max_source_positions": 1500,
}  # fmt: skip
PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen2-vl-7b": {
            "model_type": "qwen2_vl", **_decoder(3584, 28, 28, 4, 18_944, vocab_size=152_064), **_QWEN2,
            "vision_config": {**_EYES2, "hidden_size": 3584},
        },
        "qwen2-vl-72b": {
            "model_type": "qwen2_vl", **_decoder(8192, 80, 64, 8, 29_568, vocab_size=152_064), **_QWEN2,
            "vision_config": {**_EYES2, "hidden_size": 8192},
        },
        "qwen2.5-vl-7b": {
            "model_type": "qwen2_5_vl", **_decoder(3584, 28, 28, 4, 18_944, vocab_size=152_064), **_QWEN2,
            "vision_config": {**_EYES25, "out_hidden_size": 3584},
        },
        "qwen3-vl-30b-a3b": {
            "model_type": "qwen3_vl_moe",
            "text_config": {"model_type": "qwen3_vl_moe_text", **_decoder(2048, 48, 32, 4, 6144), **_QWEN3,
                            **_experts(128, 768)},
            "vision_config": {**_EYES3, "out_hidden_size": 2048},
        },
        "qwen3-vl-235b-a22b": {
            "model_type": "qwen3_vl_moe",
            "text_config": {"model_type": "qwen3_vl_moe_text", **_decoder(4096, 94, 64, 4, 12_288), **_QWEN3,
                            **_experts(128, 1536)},
            "vision_config": {**_EYES3, "out_hidden_size": 4096},
        },
        "qwen3.5-9b": {
            "model_type": "qwen3_5",
            "text_config": {"model_type": "qwen3_5_text", **_decoder(4096, 32, 16, 4, 12_288), **_QWEN35},
            "vision_config": {**_EYES35, "out_hidden_size": 4096},
        },
        "qwen3.5-35b-a3b": {
            "model_type": "qwen3_5_moe",
            "text_config": {"model_type": "qwen3_5_moe_text", **_decoder(2048, 40, 16, 2, 0), **_QWEN35,
                            "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
                            "shared_expert_intermediate_size": 512},
            "vision_config": {**_EYES35, "out_hidden_size": 2048},
        },
        "qwen3-omni-30b-a3b": {
            "model_type": "qwen3_omni_moe",
            "thinker_config": {
                "text_config": {"model_type": "qwen3_omni_moe_text", **_decoder(2048, 48, 32, 4, 768), **_QWEN3,
                                **_experts(128, 768), "vocab_size": 152_064, "rope_theta": 1e6},
                "vision_config": {**_EYES3, "out_hidden_size": 2048},
                "audio_config": _EARS, "position_id_per_seconds": 13, "audio_token_id": 151_675,
                "audio_start_token_id": 151_669,
            },
        },
    }
)  # fmt: skip
"""Entries of the published `config.json` of each size, as far as they say what is computed; of whole omni models the
thinker."""


def plan_for_search(*, tokens: int, packs: int, size: str = "qwen3-vl-30b-a3b") -> "SightWorkload":
    """A published model that sees, `packs` packs of `tokens` tokens a step. ValueError for an unknown size."""
    if size not in PUBLISHED:
        raise ValueError(f"--size {size} is not one of {', '.join(PUBLISHED)}")
    return SightWorkload(size, described(size), tokens=tokens, packs=packs)


def described(size: str) -> VisionLanguageConfig:
    """The model of a published size."""
    said = PUBLISHED[size]
    return SEEING[said["model_type"]].config(said)


@dataclass(frozen=True)
class SightWorkload:
    """All of a model that sees trained with AdamW and clipping in bfloat16 over float32 masters, next-token loss.

    Each pack is one document, the longest that there can be, `seen` of whose tokens are of films, and of a model that
    hears `heard` of recordings.
    """

    name: str
    cfg: VisionLanguageConfig
    tokens: int
    packs: int
    seen: float = _SEEN
    heard: float = _HEARD

    @property
    def stacks(self) -> Mapping[str, int]:
        """The decoder's turns of layers, which are one layer where all are of the same parameters, and the layers of
        the towers, which are taken to be alike in each.
        """
        found = {"text": self.cfg.text.layers // len(self._turn), "vision": self.cfg.media.tower.layers}
        sound = self.cfg.media.sound
        return found if sound is None else {**found, "audio": sound.tower.layers}

    @cached_property
    def model_shape(self) -> ModelShape:
        """As of the decoder; the tower's products and its attention, which is not causal, count as the decoder's
        products.
        """
        text, tower, sound = self.cfg.text, self.cfg.media.tower, self.cfg.media.sound
        heads, patches = text.attention, self.seen * tower.merge**2
        near = (tower.window or 0) * tower.merge
        pairs = [self._side**2 if near == 0 or i in tower.full_layers else near**2 for i in range(tower.layers)]
        seen = 12.0 * sum(pairs) * tower.d_model * patches
        if sound is not None:
            seen += 6.0 * spec.count(audio_tower.specs(sound.tower)) * self.heard
        return ModelShape(
            tokens=self.tokens,
            packs=self.packs,
            layers=text.layers,
            d_model=text.d_model,
            heads=heads.heads,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            weight_flops=6.0 * active_weights(text) + 6.0 * _products(self.cfg, self.seen) + seen,
            attention_flops=12.0 * self.tokens * heads.heads * heads.head_dim * self._attending,
            experts=text.moe.experts if text.moe else 0,
            top_k=text.moe.top_k if text.moe else 0,
        )

    def make(self, depths: Mapping[str, int], candidate: Candidate) -> WorkloadStep:
        """The training step of a model with so many turns of layers in the decoder and layers in the tower."""
        cfg = self.shallow(depths)
        return planned_step(
            NativeSight(cfg).loss, vision_language.specs(cfg), self._batch(candidate), rate=1e-5,
            micro_batches=candidate.micro_batches, precision=Precision(compute="bfloat16"), rules=RULES,
            components=components(candidate, hears=cfg.media.sound is not None),
        )  # fmt: skip

    def shallow(self, depths: Mapping[str, int]) -> VisionLanguageConfig:
        """The model with so much of each stack; a part of the tower that sees has one deep layer, if any, and
        its frames are all seen through windows, if any.
        """
        text, media, layers = self.cfg.text, self.cfg.media, depths["vision"]
        tower, sound = media.tower, media.sound
        if sound is not None:
            sound = replace(sound, tower=replace(sound.tower, layers=depths["audio"]))
        if layers < tower.layers:
            tower = replace(tower, layers=layers, full_layers=(), deep_layers=(0,) if tower.deep_layers else ())
        kept = depths["text"] * len(self._turn)
        text = replace(text, layers=kept, pattern=text.pattern[:kept])
        return replace(self.cfg, text=text, media=replace(media, tower=tower, sound=sound))

    @cached_property
    def _turn(self) -> list[spec.Tree]:
        """The parameters of the first layers of the decoder, after which the same come again."""
        text = self.cfg.text
        each = [layer_block(text, i).specs(1.0) for i in range(text.layers)]
        turns = (n for n in range(1, text.layers + 1) if text.layers % n == 0)
        return next(each[:n] for n in turns if each[n:] == each[:-n])

    @property
    def _attending(self) -> int:
        """How many layers of the decoder attend."""
        return sum("w_k_DGK" in layer["attention"] for layer in self._turn) * self.stacks["text"]

    @property
    def _side(self) -> int:
        """Patches a side of a frame."""
        tower = self.cfg.media.tower
        return _PIXELS // (tower.patch * tower.merge) * tower.merge

    def _batch(self, candidate: Candidate) -> dict[str, Any]:
        tower = self.cfg.media.tower
        T, frame = self.tokens * self.packs, self._side**2
        parts = candidate.ranks * candidate.micro_batches
        N = max(1, math.ceil(T * self.seen * tower.merge**2 / frame / parts)) * frame * parts
        media: dict[str, Any] = {
            "pixels": Aval((N, tower.d_patch), torch.float32, _CPU),
            "places": _ids(N, 2),
            "frames": _documents(N, frame, parts),
            "index": _ids(N // tower.merge**2),
        }
        if tower.window is not None:
            media["windows"] = _documents(N, (tower.window * tower.merge) ** 2, parts)
        if tower.side is not None:
            media |= {"taps": _ids(N, 4), "shares": Aval((N, 4), torch.float32, _CPU)}
        leaves: dict[str, Any] = {name: _ids(T) for name in ("tokens", "labels")}
        exact = torch.float32 if self.cfg.media.exact else torch.int64
        leaves |= {"positions": Aval((T, 3), exact, _CPU), "replaced": Aval((T,), torch.bool, _CPU)}
        offsets = Aval((self.packs * _DOCUMENTS + 1,), torch.int32, _CPU)
        segments = Documents(_ids(T), offsets, self.tokens)  # type: ignore[arg-type]
        sound = self.cfg.media.sound
        heard = {} if sound is None else {"audio": self._sound(sound.tower, parts)}
        return {**leaves, "segments": segments, "media": media, **heard}

    def _sound(self, tower: AudioTowerConfig, parts: int) -> dict[str, Aval]:
        """Chunks of recordings, as many in each of so many parts."""
        each = tower.rows // (1 + tower.paired)
        C = max(1, math.ceil(self.tokens * self.packs * self.heard / each / parts)) * parts
        found = {"mel": Aval((C, tower.mels, tower.chunk), torch.float32, _CPU), "heard": _ids(C)}
        return {**found, "parts": _ids(C * tower.rows), "index": _ids(C * each)}


def components(candidate: Candidate, *, hears: bool = False) -> dict[str, Layout]:
    """The towers' parameters are divided over all ranks of a replica, and what they read is whole; the decoder's are as
    `candidate` says. Where tokens are sent to experts, those of attention are divided within a sequence and copied
    elsewhere (HSDP).
    """
    found = dict.fromkeys(("vision", *(("audio",) if hears else ())), Layout(sequence=None))
    if candidate.expert > 1 and candidate.sequence > 1:
        within = Layout(("sequence",), sequence=candidate.attention)
        found["text.layers.*.attention"] = within
    return found


def _products(cfg: VisionLanguageConfig, seen: float) -> float:
    """Weights that a token of a pack is multiplied with in the tower, on average: of patches, and of merged squares."""
    tower, specs = cfg.media.tower, vision_tower.specs(cfg.media.tower)
    of_patch = spec.count({"patch": specs["patch"], "layers": specs["layers"]})
    of_token = spec.count({name: specs[name] for name in ("merger", "deep") if name in specs})
    return seen * (tower.merge**2 * of_patch + of_token)


def _documents(n: int, longest: int, parts: int) -> Any:
    places = parts * (1 << (max(8, n // parts // longest) - 1).bit_length())
    return Documents(_ids(n), Aval((places + 1,), torch.int32, _CPU), longest)  # type: ignore[arg-type]


def _ids(*shape: int) -> Aval:
    return Aval(shape, torch.int64, _CPU)
