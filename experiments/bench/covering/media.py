"""Language models of transformers with pictures, videos or sound among their tokens.

Legend: B rows, L tokens of a row.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench.covering.case import Built, Case, nothing_to_compare
from experiments.bench.covering.rowwise import DROPOUTS, roundtrip
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import nest, parameters

ROWS, TEXT = 4, 5
IMAGE, VIDEO, START, END, AUDIO = 120, 121, 122, 123, 124
"""Ids of the tokens that stand for media, or begin and end them."""
_TOKENS = {
    "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO, "video_token_index": VIDEO,
    "vision_start_token_id": START, "vision_end_token_id": END, "audio_token_id": AUDIO, "boi_token_index": START,
    "eoi_token_index": END, "audio_token_index": AUDIO, "image_start_token_id": START, "image_end_token_id": END,
}  # fmt: skip
_WORDS = {
    "vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "sliding_window": 8,
    "layer_types": None, "query_pre_attn_scalar": 8, "shared_expert_intermediate_size": 0, "num_local_experts": 4,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128,
}  # fmt: skip
_EYES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 4, "depth": 2, "num_heads": 2, "embed_dim": 16, "out_hidden_size": 16, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1], "window_size": 16, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "projection_dim": 16, "vision_use_head": False, "tokens_per_second": 2,
    "attention_bias": True, "num_image_tokens": 16,
}  # fmt: skip


_EARS = {
    "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8,
    "max_source_positions": 20, "output_dim": 16, "downsample_hidden_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Seeing:
    """A model with media. `kind`: transformers' type of model. `tokens`: how many tokens a picture has.

    `inputs`: the media of `ROWS` rows by transformers' names. `options`, `text`, `vision`, `sound`: its sizes.
    `token`: that stands for media. `kinds`: transformers' name of the leaf with the kinds of tokens. `auto`: its class.
    """

    kind: str
    tokens: int
    inputs: Callable[[torch.Generator], Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    token: int = IMAGE
    splits: frozenset[str] = frozenset()
    kinds: str = ""
    auto: str = "AutoModelForImageTextToText"
    sound: Mapping[str, Any] | None = None

    def config(self) -> Any:
        """The small configuration, without dropout."""
        from transformers import CONFIG_MAPPING

        make: Any = CONFIG_MAPPING[self.kind]
        usual = make().to_dict()
        whole = {name: value for name, value in {**_TOKENS, **DROPOUTS}.items() if name in usual}
        parts = {
            "text_config": _small(usual["text_config"], _WORDS, self.text),
            "vision_config": _small(usual["vision_config"], _EYES, self.vision),
        }
        if self.sound is not None:
            parts["audio_config"] = dict(self.sound)
        return make(**{**whole, **parts, **self.options})

    def build(self) -> Built:
        """The row, with what the plain module gives by itself."""
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        config = nothing_to_compare(self.config)
        module = nothing_to_compare(partial(self._module, config))
        batch = self._batch()
        wanted = nothing_to_compare(partial(self._plain, copy.deepcopy(module), batch))
        model = from_transformers(copy.deepcopy(config), task="image_text_to_text")
        params = nest({name: p.detach().clone() for name, p in parameters(module).items()})
        names = {"input_ids": "tokens", "pixel_values": "pixels", "input_features": "sound"}
        assert model.media is not None
        given = {names.get(name, name): x for name, x in batch.items()}
        return Built(
            model=model,
            params=params,
            batch=model.media(given),
            expected=lambda: wanted,
            splits=self.splits,
            roundtrip=partial(roundtrip, self.auto, "image_text_to_text", model, params),
            about="rows with pictures",
        )

    def _module(self, config: Any) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        auto = getattr(transformers, self.auto)
        build = getattr(auto, "from_config", None) or auto._from_config
        made: nn.Module = build(copy.deepcopy(config), attn_implementation="eager", experts_implementation="eager")
        return made.train()

    def _batch(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(3, 100, (ROWS, 2 * TEXT), generator=generator)
        begin, end = torch.full((ROWS, 1), START), torch.full((ROWS, 1), END)
        shown = torch.full((ROWS, self.tokens), self.token)
        tokens = torch.cat([words[:, :TEXT], begin, shown, end, words[:, TEXT:]], 1)
        labels = tokens.roll(-1, 1)
        labels[:, -1] = -100
        labels[labels >= IMAGE] = -100
        kinds: dict[str, Any] = {self.kinds: (tokens == IMAGE).long() + 2 * (tokens == VIDEO)} if self.kinds else {}
        return {"input_ids": tokens, "labels": labels, **kinds, **self.inputs(generator)}

    def _plain(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[float, dict[str, Tensor]]:
        given = {name: x for name, x in batch.items() if name != "labels"}
        given["attention_mask"] = torch.ones_like(batch["input_ids"])  # without one, thinkers place tokens as in texts
        logits = module(**given, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {float(loss)}")
        loss.backward()
        return float(loss.detach()), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _small(usual: Mapping[str, Any], sizes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {"model_type": usual["model_type"]} if "model_type" in usual else {}
    named = {name: value for name, value in {**DROPOUTS, **sizes}.items() if name in usual}
    return {**kept, **named, **options}


def pictures(generator: torch.Generator, size: int = 16, each: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Noise as a picture for each row."""
    return {"pixel_values": torch.randn(ROWS, *each, 3, size, size, generator=generator)}


def _cut(generator: torch.Generator) -> dict[str, Tensor]:
    """Pictures of 16 x 32 as a small one and two tiles."""
    return {**pictures(generator, each=(3,)), "image_sizes": torch.tensor([[16, 32]] * ROWS)}


def _sized(generator: torch.Generator) -> dict[str, Tensor]:
    """Pictures with their shapes."""
    return {**pictures(generator), "image_sizes": torch.tensor([[16, 16]] * ROWS)}


def _patches(generator: torch.Generator, patch: int = 4, video: bool = False) -> dict[str, Tensor]:
    """Pictures of two shapes as patches: `[B * 48, ...]`, and their grids; of a video two frames."""
    frames = 2 if video else 1
    shapes = torch.tensor([[frames, 4, 12], [frames, 8, 6], [frames, 6, 8], [frames, 12, 4]])
    pixels = torch.randn(int(shapes.prod(1).sum()), 3 * 2 * patch * patch, generator=generator)
    if video:
        return {"pixel_values_videos": pixels, "video_grid_thw": shapes}
    return {"pixel_values": pixels, "image_grid_thw": shapes}


def cases() -> tuple[Case, ...]:
    """A row for each family, and one with videos for some."""
    return tuple(Case("media", name, row.build) for name, row in _rows().items())


def _rows() -> dict[str, Seeing]:
    mrope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    grids = partial(Seeing, tokens=12, inputs=_patches, text=mrope, kinds="mm_token_type_ids")
    return {
        "qwen2_vl": grids("qwen2_vl", vision={"hidden_size": 16}),
        "qwen2_5_vl": grids("qwen2_5_vl"),
        "qwen3_vl": grids("qwen3_vl"),
        "qwen3_vl_moe": grids("qwen3_vl_moe", splits=frozenset({"expert"})),
        "qwen2_5_omni_thinker": grids(
            "qwen2_5_omni_thinker",
            options={"vision_start_token_id": START},
            auto="Qwen2_5OmniThinkerForConditionalGeneration",
            sound=_EARS,
            kinds="",
        ),
        "qwen3_omni_moe_thinker": grids(
            "qwen3_omni_moe_thinker",
            options={"vision_start_token_id": START},
            auto="Qwen3OmniMoeThinkerForConditionalGeneration",
            sound=_EARS,
            kinds="",
        ),
        "qwen2_5_vl videos": partial(grids, inputs=partial(_patches, video=True), token=VIDEO, tokens=24)("qwen2_5_vl"),
        "glm4v": grids("glm4v"),
        "internvl": Seeing("internvl", 4, pictures, vision={"image_size": [16, 16], "patch_size": [4, 4]}),
        "gemma3": Seeing("gemma3", 4, pictures, {"mm_tokens_per_image": 4}, kinds="token_type_ids"),
        "llava": Seeing("llava", 16, pictures),
        "llava_onevision": Seeing(
            "llava_onevision", 16 + 4 * (8 + 1), _cut, {"image_grid_pinpoints": [[16, 32], [32, 16]]}
        ),
        "paligemma": Seeing("paligemma", 16, pictures, {"projection_dim": 16}, kinds="token_type_ids"),
        "aya_vision": Seeing("aya_vision", 4, pictures),
        "smolvlm": Seeing("smolvlm", 4, partial(pictures, each=(1,)), {"scale_factor": 2}),
        "idefics3": Seeing("idefics3", 4, partial(pictures, each=(1,)), {"scale_factor": 2}),
        "janus": Seeing("janus", 16, pictures),
        "mistral3": Seeing("mistral3", 4, _sized),
    }
