"""Thinker and talker (Qwen2.5-Omni, Xu et al. 2025): one hears and answers in text, the other says what was thought.

The thinker is an omni model with an audio encoder. The talker is a decoder of its own whose tokens are code frames: at
each frame it reads the codes of the frame before, the thinker's hidden state and token of the answer, and the voice it
is to speak with; the coarsest code is its prediction, and each finer one is predicted from the same state and the
coarser codes (a code predictor, as in Qwen3-Omni). By default no gradient of the talker reaches the thinker.

Legend: B answers, T code frames, Q levels of codes, K entries of a level, D thinker width, E talker width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from experiments.omni.corpus import RATE
from experiments.omni.language import BOS, EOS, Tokenizer
from experiments.spoken import questions
from experiments.spoken.questions import SPEAKERS, WORDS
from ftrain import optim
from ftrain.kernels.embedding import embedding
from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
from ftrain.kernels.mean import Mean
from ftrain.modules import audio_encoder, decoder, mlp, norm, omni
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.audio_encoder import CONV_STRIDE, AudioConfig
from ftrain.modules.autoregression import Family, generate_ids
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.moe import MoEConfig
from ftrain.modules.omni import OmniModel
from ftrain.modules.sampling import Sampling
from ftrain.modules.spec import Normal, ParamSpec, fan_in

_HOP = 128
_CLIP_TOKENS = 4
_INIT = 0.3


def tokenizer() -> Tokenizer:
    """The thinker's words: numbers, and the marks of a clip."""
    return Tokenizer((BOS, EOS, "<audio>", "</audio>", *WORDS))


def thinker(words: Tokenizer, *, width: int = 64) -> OmniModel:
    """A small sparse mixture of experts that hears; a question is four tokens."""
    heads = AttentionConfig(width, heads=4, kv_heads=2, head_dim=width // 4, qk_norm=True)
    experts = MoEConfig(width, width, experts=4, top_k=2, shared_experts=1, score="sigmoid", balance="none")
    base = DecoderConfig(len(words), width, 2, heads, moe=experts, init_std=_INIT)
    return OmniModel(base, {"audio": audio_encoder.encoder(hearing(width), begin=words.id("<audio>"),
                                                           end=words.id("</audio>"))})  # fmt: skip


def hearing(width: int = 64) -> AudioConfig:
    """The encoder of questions."""
    merge = questions.ASKING // _HOP // CONV_STRIDE // _CLIP_TOKENS
    return AudioConfig(width, 2, heads=4, d_out=width, rate=RATE, n_fft=256, hop=_HOP, mels=40, merge=merge)


@dataclass(frozen=True)
class Talker:
    """The talker's shapes: `frames` frames of `levels` codes, each one of `entries`, for a thinker `d_thinker` wide."""

    d_thinker: int
    frames: int
    levels: int
    entries: int
    width: int = 96
    layers: int = 2

    @cached_property
    def stack(self) -> DecoderConfig:
        """Its decoder; its table holds the codes of all levels, its head scores them."""
        heads = AttentionConfig(self.width, heads=4, kv_heads=4, head_dim=self.width // 4, qk_norm=True)
        return DecoderConfig(
            self.levels * self.entries, self.width, self.layers, heads, d_hidden=3 * self.width, init_std=_INIT
        )

    @property
    def finer(self) -> MlpConfig:
        """The code predictor."""
        return MlpConfig(self.width, 2 * self.width)

    def specs(self) -> dict[str, Any]:
        """`stack`, `finer` (the code predictor and its norm), `from_state_DE`, `from_token_DE`, `speakers_SE`."""
        into = ParamSpec((self.d_thinker, self.width), ("embed", "mlp"), fan_in(self.d_thinker))
        return {
            "stack": decoder.specs(self.stack),
            "finer": {"norm": norm.specs(self.width), "mlp": mlp.specs(self.finer)},
            "from_state_DE": into,
            "from_token_DE": into,
            "speakers_SE": ParamSpec((len(SPEAKERS), self.width), (None, "embed"), Normal(_INIT)),
        }

    def thought(self, params: Any, state_BD: Tensor, token_BD: Tensor, speaker_B: Tensor) -> Tensor:
        """What is known of each answer before it is said, `[B, E]`: read at every frame."""
        told_BE = state_BD @ params["from_state_DE"] + token_BD @ params["from_token_DE"]
        return told_BE + embedding(speaker_B, params["speakers_SE"])

    def summed(self, params: Any, codes_BQ: Tensor) -> Tensor:
        """The codes of a frame (a level's own numbers, from 0), or its first ones, as one row each: `[B, E]`."""
        at_BQ = codes_BQ + torch.arange(codes_BQ.shape[1], device=codes_BQ.device) * self.entries
        rows = embedding(at_BQ.flatten(), params["stack"]["embedding"]["table_VD"])
        return rows.unflatten(0, tuple(codes_BQ.shape)).sum(1)

    def scores(self, params: Any, hidden_BE: Tensor, coarser_Bq: Tensor) -> Tensor:
        """Scores `[B, K]` of the next level's codes, given those of the levels before it."""
        rows_BE = self._rows(params, hidden_BE, coarser_Bq)
        return rows_BE @ self._head(params, coarser_Bq.shape[1])

    def loss(self, params: Any, thought_BE: Tensor, codes_BTQ: Tensor) -> Mean:
        """Cross entropy in nats of each code, given all codes before it."""
        B, T, Q = codes_BTQ.shape
        said_BTE = self.summed(params, codes_BTQ.flatten(0, 1)).unflatten(0, (B, T))
        before_BTE = torch.cat([torch.zeros_like(said_BTE[:, :1]), said_BTE[:, :-1]], 1)
        x_NE = (before_BTE + thought_BE[:, None]).flatten(0, 1)
        place_N = torch.arange(B * T, device=x_NE.device)
        hidden_NE, _ = decoder.apply(
            params["stack"], x_NE, positions=place_N % T, segments=place_N // T, cfg=self.stack
        )
        codes_NQ, total = codes_BTQ.flatten(0, 1), torch.zeros((), device=x_NE.device)
        for q in range(Q):
            rows_NE = self._rows(params, hidden_NE, codes_NQ[:, :q])
            total = total + linear_cross_entropy(rows_NE, self._head(params, q), codes_NQ[:, q])
        return Mean(total, torch.full((), float(codes_BTQ.numel()), device=x_NE.device))

    def _rows(self, params: Any, hidden_NE: Tensor, coarser_Nq: Tensor) -> Tensor:
        if not coarser_Nq.shape[1]:
            return hidden_NE
        rows_NE = hidden_NE + self.summed(params, coarser_Nq)
        finer = params["finer"]
        return hidden_NE + mlp.apply(finer["mlp"], norm.apply(finer["norm"], rows_NE), cfg=self.finer)

    def _head(self, params: Any, level: int) -> Tensor:
        return params["stack"]["head"]["w_DV"][:, level * self.entries : (level + 1) * self.entries]

    def say(self, params: Any, thought_BE: Tensor, *, key: Tensor | None = None, temperature: float = 0.0) -> Tensor:
        """Codes `[B, T, Q]` of what the talker says; at `temperature` 0 the most likely, level by level."""
        ids_BN = generate_ids(
            params, thought_BE, family=self.family(), max_new=self.frames * self.levels, key=key,
            how=Sampling(temperature, None, None),
        )  # fmt: skip
        return ids_BN.unflatten(1, (self.frames, self.levels))

    def family(self) -> Family:
        """Its codes one after the other, for `generate_ids`; prompts are what `thought` returns, as many as answers."""

        def prefill(params: Any, thought_BE: Tensor, room: int) -> tuple[Tensor, Any]:
            B = len(thought_BE)
            place_B = torch.zeros(B, dtype=torch.int64, device=thought_BE.device)
            hidden_BE, cache = decoder.prefill(
                params["stack"], thought_BE, positions=place_B, length_B=place_B + 1, room=self.frames, cfg=self.stack
            )
            none_B0 = place_B.new_zeros(B, 0)
            return self.scores(params, hidden_BE, none_B0), (thought_BE, hidden_BE, cache, none_B0, 0)

        def extend(params: Any, chosen_B: Tensor, state: Any) -> tuple[Tensor, Any]:
            thought_BE, hidden_BE, cache, codes_Bq, frame = state
            codes_Bq = torch.cat([codes_Bq, chosen_B[:, None]], 1)
            if codes_Bq.shape[1] == self.levels:
                frame += 1
                hidden_BE, cache = decoder.extend(
                    params["stack"],
                    self.summed(params, codes_Bq) + thought_BE,
                    positions=torch.full_like(chosen_B, frame),
                    cache=cache,
                    cfg=self.stack,
                )
                codes_Bq = codes_Bq[:, :0]
            return self.scores(params, hidden_BE, codes_Bq), (thought_BE, hidden_BE, cache, codes_Bq, frame)

        return Family(prefill, extend)


@dataclass(frozen=True)
class Both:
    """Thinker and talker. `joint`: the talker's gradient reaches the thinker."""

    thinker: OmniModel
    talker: Talker
    joint: bool = False

    def specs(self) -> dict[str, Any]:
        """`thinker` and `talker`."""
        return {"thinker": omni.specs(self.thinker), "talker": self.talker.specs()}

    def losses(self, params: Any, batch: Mapping[str, Any]) -> dict[str, Mean]:
        """`text`: nats of a token of the answer; `speech`: nats of a code of it.

        The batch is the thinker's (`ftrain.modules.packing`) with `answer_B`, the place of each answer's token,
        `speaker_B` and `codes_BTQ`.
        """
        hidden_TD, x_TD = self._thought(params, batch)
        base = self.thinker.foundation
        text = decoder.loss(params["thinker"]["foundation"], hidden_TD, batch["labels_T"], base)
        thought_BE = self._told(params, hidden_TD, x_TD, batch)
        return {"text": text, "speech": self.talker.loss(params["talker"], thought_BE, batch["codes_BTQ"])}

    def thoughts(self, params: Any, batch: Mapping[str, Any]) -> Tensor:
        """What the talker reads of each answer in a batch, `[B, E]`."""
        return self._told(params, *self._thought(params, batch), batch)

    def _thought(self, params: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        own = params["thinker"]
        rows, places, _ = omni.media_rows(own, batch, model=self.thinker)
        x_TD = omni.merge(decoder.embed(own["foundation"], batch["tokens_T"]), rows, places)
        return omni.hidden_states(own, x_TD, batch, model=self.thinker)[0], x_TD

    def _told(self, params: Any, hidden_TD: Tensor, x_TD: Tensor, batch: Mapping[str, Any]) -> Tensor:
        state_BD, token_BD = (rows.index_select(0, batch["answer_B"]) for rows in (hidden_TD, x_TD))
        if not self.joint:
            state_BD, token_BD = state_BD.detach(), token_BD.detach()
        return self.talker.thought(params["talker"], state_BD, token_BD, batch["speaker_B"])


def optimizer(rate: float, steps: int) -> optim.Transform:
    """Muon on the matrices of layers, AdamW on all else, warm-up and cosine."""
    schedule = optim.warmup_cosine(rate, warmup_steps=min(30, steps // 5), total_steps=steps + 1, floor=rate / 20)
    groups = {
        "matrices": optim.muon(schedule, weight_decay=0.02, adjust="match_rms_adamw", ns_dtype=None),
        "others": optim.adamw(schedule, b2=0.98, weight_decay=0.02),
    }
    by_path = optim.multi_transform(groups, [("**.layers.*.**.w_*", "matrices"), ("**", "others")])
    return optim.chain(optim.clip_by_global_norm(1.0), optim.skip_nonfinite(by_path))
