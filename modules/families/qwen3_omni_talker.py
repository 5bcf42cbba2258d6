"""Qwen3-Omni's talker: from what a thinker has read and written to the codes of speech, a frame at a time.

Each token of the talker's sequence is a row of the thinker, the embedding of a word or, of media, a hidden state, by a
projection of its own, plus the embeddings of the codes of a frame. A stack with experts, shared ones too, gives the
first code of the next frame; the codes behind it are `ftrain.modules.code_predictor`'s. Source: Qwen team, Qwen3-Omni
(arXiv 2509.17765).

Legend: S tokens of the talker, W width of the thinker, D width of the talker, N frames, R codes behind the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.embedding import embedding, merge_rows
from ftrain.kernels.mean import Mean
from ftrain.kernels.pack import pack_tokens, take_rows
from ftrain.modules import code_predictor, decoder, linear
from ftrain.modules.code_predictor import PredictorConfig
from ftrain.modules.decoder_config import DecoderConfig, layer_with
from ftrain.modules.families.family import tensors
from ftrain.modules.families.vision_language import Shapes, decoder_of
from ftrain.modules.fused_experts import fused_experts_block
from ftrain.modules.hf_config import decoder_config
from ftrain.modules.hf_fields import Config, require_understood, size
from ftrain.modules.hf_names import HfTensor, Names, decoder_names, natural_order, under
from ftrain.modules.layers import moe_block
from ftrain.modules.sampling import Sampling
from ftrain.modules.spec import Tree
from ftrain.modules.speech_lines import ChatIds, CodeIds, qwen3_line
from ftrain.modules.speech_packs import SpeechConfig
from ftrain.modules.talker import Talker

ROPE_BASE, SECTIONS = 1e4, (24, 20, 20)
"""What transformers takes for entries of the stack that are not there."""
_CODES = ("codec_bos_id", "codec_eos_token_id", "codec_pad_id", "codec_nothink_id", "codec_think_bos_id",
          "codec_think_eos_id")  # fmt: skip
_READ = (
    "accept_hidden_layer", "code_predictor_config", "num_code_groups", "speaker_id", "text_config",
    "thinker_hidden_size", *_CODES,
    # of the thinker, whose places the talker takes over
    "audio_end_token_id", "audio_start_token_id", "audio_token_id", "image_token_id", "position_id_per_seconds",
    "seconds_per_chunk", "spatial_merge_size", "video_token_id", "vision_end_token_id", "vision_start_token_id",
)  # fmt: skip
_PROJECTIONS = (("text_projection", "words"), ("hidden_projection", "media"))
_LINEARS = (("linear_fc1.weight", "up.w"), ("linear_fc1.bias", "up.b"), ("linear_fc2.weight", "down.w"),
            ("linear_fc2.bias", "down.b"))  # fmt: skip
_SHARED = (
    ("shared_expert.gate_proj.weight", "shared.w_gate_DF"),
    ("shared_expert.up_proj.weight", "shared.w_up_DF"),
    ("shared_expert.down_proj.weight", "shared.w_down_FD"),
    ("shared_expert_gate.weight", "w_shared_gate_D1"),
)


@dataclass(frozen=True)
class TalkerConfig:
    """A `stack` over first codes, its `predictor` of the others, and projections of `d_hidden` from the thinker's rows.

    `d_thinker`: the width of those rows; `layer`: the layer of the thinker whose output is read of media (0: its input
    rows). `ids`: codes that are no sound; `voices`: the code of each voice, by its name.

    ValueError where the predictor is of another width than the stack, or an id is none of its codes.
    """

    stack: DecoderConfig
    predictor: PredictorConfig
    d_thinker: int
    d_hidden: int
    layer: int
    ids: CodeIds
    voices: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.predictor.stack.d_model != self.stack.d_model:
            raise ValueError(
                f"the code predictor is {self.predictor.stack.d_model} wide and the talker, whose states it reads, "
                f"{self.stack.d_model}"
            )
        named = [self.ids.begin, self.ids.end, self.ids.pad, *self.ids.silent, *dict(self.voices).values()]
        if not 0 <= min(named) <= max(named) < self.stack.vocab:
            raise ValueError(
                f"{self.ids} or a voice of {self.voices} names a code outside of the talker's {self.stack.vocab}"
            )


def specs(cfg: TalkerConfig) -> Tree:
    """`stack` (`decoder.specs`), `predictor` (`code_predictor.specs`), and the projections `words` and `media`."""
    return {
        "stack": decoder.specs(cfg.stack),
        "predictor": code_predictor.specs(cfg.predictor),
        **{name: _projection_specs(cfg) for _, name in _PROJECTIONS},
    }


def _projection_specs(cfg: TalkerConfig) -> Tree:
    return {
        "up": linear.specs(cfg.d_thinker, cfg.d_hidden, ("embed", "mlp"), bias=True),
        "down": linear.specs(cfg.d_hidden, cfg.stack.d_model, ("mlp", "embed"), bias=True),
    }


def project(params: Tree, rows_SW: Tensor) -> Tensor:
    """Rows of the thinker as rows of the talker, `[S, D]`, by `params["words"]` or `params["media"]`; computed in their
    dtype.
    """
    return linear.apply(params["down"], F.silu(linear.apply(params["up"], rows_SW.to(params["up"]["w"].dtype))))


def embed(params: Tree, batch: Mapping[str, Any]) -> Tensor:
    """The stream `[S, D]`.

    `batch`: "rows" `[S, W]`, of the thinker; "words", int64 `[S]`, below 0 where the row is a state of media; "codes",
    int64 `[S]`, the first code of each token, below 0 for none; and where there are frames "frames": "codes" `[N, R +
    1]`, all codes of each, below 0 for a row without a frame, and "index" `[N]`, the token of each frame, S for none.
    """
    words_SD, media_SD = (project(params[name], batch["rows"]) for _, name in _PROJECTIONS)
    x_SD = torch.where(batch["words"][:, None] < 0, media_SD, words_SD) + first_rows(params, batch["codes"])
    frames = batch.get("frames")
    if frames is None:
        return x_SD
    rest_ND = code_predictor.embed(params["predictor"], frames["codes"][:, 1:]).to(x_SD.dtype)
    return x_SD + merge_rows(torch.zeros_like(x_SD), rest_ND, frames["index"])


def first_rows(params: Tree, codes_S: Tensor) -> Tensor:
    """The rows of first codes, int64 `[S]`, in their table, `[S, D]`; zeros for those below 0."""
    rows_SD = embedding(codes_S.clamp(min=0), params["stack"]["embedding"]["table_VD"])
    return rows_SD.masked_fill(codes_S[:, None] < 0, 0)


def losses(params: Tree, hidden_SD: Tensor, batch: Mapping[str, Any], cfg: TalkerConfig) -> dict[str, Mean]:
    """The cross entropy, in nats, of first codes ("codes"), and where there are frames of those behind ("residuals").

    `batch`: as for `embed`, with "labels" `[S]`, the first code behind each token, -100 for none.
    """
    found = {"codes": decoder.loss(params["stack"], hidden_SD, batch["labels"], cfg.stack)}
    frames = batch.get("frames")
    if frames is None:
        return found
    index_N, nowhere = frames["index"], pack_tokens(len(hidden_SD))
    state_ND = take_rows(hidden_SD, torch.where(index_N == nowhere, nowhere, index_N - 1))
    first_ND, rest_NR = first_rows(params, frames["codes"][:, 0]), frames["codes"][:, 1:]
    return {**found, "residuals": code_predictor.loss(params["predictor"], state_ND, first_ND, rest_NR, cfg.predictor)}


def talker(cfg: TalkerConfig, chat: ChatIds) -> Talker:
    """The talker's functions. `chat`: ids of the thinker's vocabulary."""

    def frame(params: Tree, state_BD: Tensor, first_B: Tensor, key: Tensor | None, how: Sampling) -> Tensor:
        first_BD = first_rows(params, first_B)
        rest_BR = code_predictor.generate(params["predictor"], state_BD, first_BD, cfg.predictor, key=key, how=how)
        return torch.cat([first_B[:, None], rest_BR], 1)

    def go_on(params: Tree, codes_BG: Tensor, rows_BW: Tensor) -> Tensor:
        rest_BD = code_predictor.embed(params["predictor"], codes_BG[:, 1:])
        return first_rows(params, codes_BG[:, 0]) + rest_BD + project(params["words"], rows_BW)

    return Talker(
        specs(cfg),
        cfg.stack,
        layer=cfg.layer,
        speech=SpeechConfig(
            qwen3_line, chat, cfg.ids, cfg.predictor.groups, cfg.predictor.stack.vocab, voices=cfg.stack.vocab
        ),
        ends=(cfg.ids.end,),
        terms=("codes", "residuals"),
        embed=embed,
        losses=lambda params, hidden_SD, batch: losses(params, hidden_SD, batch, cfg),
        frame=frame,
        go_on=go_on,
    )


def config(config: Config, *, shapes: Shapes | None = None, prefix: str = "") -> TalkerConfig:
    """The talker that a `config.json` (or its `talker_config`) describes. ValueError names an entry that it cannot
    follow.

    `shapes`: of a folder's tensors, those of the talker called `prefix` and something: experts are one tensor of a
    layer where the talker was saved by itself, and a tensor each within a whole model.
    """
    require_understood(config, _READ)
    text, rest = _part(config, "text_config"), _part(config, "code_predictor_config")
    shared = size(text, "shared_expert_intermediate_size")
    left = ("shared_expert_intermediate_size", "mlp_only_layers", "decoder_sparse_step")  # all layers have experts
    stack = decoder_of(
        {name: value for name, value in text.items() if name not in left},
        like="qwen3_moe",
        missing={"num_key_value_heads": 2},
        rope_base=ROPE_BASE,
        interleaved=True,
        sections=SECTIONS,
    )
    assert stack.moe is not None
    routed = replace(stack.moe, d_shared=shared, shared_gate=True)
    experts = fused_experts_block if is_fused(shapes or {}, prefix) else moe_block
    groups = size(config, "num_code_groups", 32)
    if (of_rest := size(rest, "num_code_groups", 32)) != groups:
        raise ValueError(
            f"config.json: num_code_groups={groups} of the talker are {of_rest} in code_predictor_config: leave what "
            "the weights have"
        )
    predictor = decoder_config({"num_key_value_heads": 8, **rest, "num_code_groups": None, "model_type": "qwen3"})
    begin, end, pad, *silent = (_id(config, name) for name in _CODES)
    voices = config.get("speaker_id") or {}
    return TalkerConfig(
        replace(stack, moe=routed, pattern=(layer_with(replace(stack, moe=routed), mlp=experts(routed)),)),
        PredictorConfig(predictor, groups),
        d_thinker=size(config, "thinker_hidden_size", 2048),
        d_hidden=size(text, "intermediate_size", 2048),
        layer=_id(config, "accept_hidden_layer"),
        ids=CodeIds(begin, end, pad, tuple(silent)),
        voices=tuple((voice, _id(voices, voice)) for voice in voices),
    )


def is_fused(shapes: Shapes, prefix: str = "") -> bool:
    """Whether a layer's experts are one tensor in a folder whose tensors of the talker begin with `prefix`."""
    return f"{prefix}model.layers.0.mlp.experts.gate_up_proj" in shapes


def _part(config: Config, name: str) -> Mapping[str, Any]:
    found = config.get(name)
    if not isinstance(found, Mapping):
        raise ValueError(f"config.json: {name}={found!r} must be an object, what a part of the talker is made of")
    return found


def _id(config: Config, name: str) -> int:
    found = config.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise ValueError(f"config.json: {name}={found!r} must be a whole number of at least 0")
    return found


def names(cfg: TalkerConfig, shapes: Shapes, *, prefix: str = "") -> Names:
    """The talker's tensors, called `prefix` and something, as they lie in a folder of tensors of these shapes."""
    assert cfg.stack.moe is not None
    fused = is_fused(shapes, prefix)
    usual = replace(cfg.stack, pattern=(), moe=replace(cfg.stack.moe, d_shared=None, shared_gate=False))
    of_stack = [name for name in decoder_names(usual) if not (fused and name.index is not None)]
    for i in range(cfg.stack.layers):
        there, here = f"model.layers.{i}.mlp", f"layers.{i}.moe"
        of_stack += tensors(there, here, _SHARED)
        if fused:
            of_stack.append(HfTensor(f"{there}.experts.gate_up_proj", f"{here}.w_gate_up_EDF", transposed=True))
            of_stack.append(HfTensor(f"{there}.experts.down_proj", f"{here}.w_down_EFD", transposed=True))
    found = [replace(n, name=_CALLED.get(n.name, n.name)) for n in under(of_stack, "stack")]
    for name, own in _PROJECTIONS:
        found += [HfTensor(f"{name}.{part}", f"{own}.{leaf}", transposed=leaf.endswith("w")) for part, leaf in _LINEARS]
    of_rest = [name for name in decoder_names(cfg.predictor.stack) if name.leaf.startswith(("layers.", "norm."))]
    found += under(of_rest, "predictor", name="code_predictor.")
    for g in range(cfg.predictor.groups - 1):
        there = f"code_predictor.model.codec_embedding.{g}.weight"
        found.append(HfTensor(there, f"predictor.tables.{g}.table_VD"))
        found.append(HfTensor(f"code_predictor.lm_head.{g}.weight", f"predictor.heads.{g}.w_DV", transposed=True))
    return tuple(sorted((replace(n, name=prefix + n.name) for n in found), key=natural_order))


_CALLED = {"model.embed_tokens.weight": "model.codec_embedding.weight", "lm_head.weight": "codec_head.weight"}
