"""The composition: layers below the language model turn sound into text, layers above it turn text into sound.

Three tracks of a document lie in one pack: frames that are heard, text that is written, units that are spoken. Below,
frames attend to each other and say letters (CTC); what the language model reads of a frame is the mean of the letters'
embeddings by their chances. Above, units attend to earlier units and to the last few tokens of the text, which is
written while they are spoken. Source: Zhang et al., Stream-Omni, arXiv 2506.13642.

Legend: T tokens of the pack, W numbers of a frame, D width, V text tokens, K units, R tokens of text that a unit reads,
H heads, C head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.mean import Mean
from ftrain.kernels.pack import pack_tokens, take_rows
from ftrain.modules import attention, decoder, embedding, encoder_stack, linear, norm
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Context
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.encoder_stack import StackConfig
from ftrain.modules.layers import attention_block, mlp_block, residual_layer
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.packed_ctc import Transcripts, ctc_loss
from ftrain.modules.spec import Normal, ParamSpec, Tree, zeros

HEARS, WRITES, SPEAKS = 0, 1, 2
"""The tracks, as `track_T` has them."""


@dataclass(frozen=True)
class Talker:
    """`d` wide with `heads` heads: `below`, `trunk` and `above` layers. `window`: numbers of a heard frame; `vocab`
    tokens of text, of which `blank` is CTC's; `units` of sound; `reads` tokens of text that a unit reads at most.
    """

    window: int
    vocab: int
    blank: int
    units: int
    reads: int = 5
    d: int = 64
    heads: int = 4
    below: int = 3
    trunk: int = 3
    above: int = 2

    @property
    def hearing(self) -> StackConfig:
        """The layers below."""
        return StackConfig(self.d, self.below, self.heads, 3 * self.d)

    @property
    def writing(self) -> DecoderConfig:
        """The language model."""
        return DecoderConfig(self.vocab, self.d, self.trunk, self._attention(), d_hidden=2 * self.d)

    def _attention(self, *, rope: bool = True) -> AttentionConfig:
        base = 10_000.0 if rope else None
        return AttentionConfig(self.d, self.heads, self.heads, self.d // self.heads, qk_norm=True, rope_base=base)

    def speaking(self, read: "Read | None" = None) -> Block:
        """A layer above; to run it, with the text that its units read."""
        within = residual_layer(
            self.d, attention=attention_block(self._attention()), mlp=mlp_block(MlpConfig(self.d, 2 * self.d))
        )
        crossing = self._attention(rope=False)

        def specs(out_gain: float) -> Tree:
            cross = attention.specs(crossing, out_gain=out_gain)
            nearness = ParamSpec((self.reads, self.heads), (None, "heads"), zeros())
            return {
                "within": within.specs(out_gain),
                "norm": norm.specs(self.d),
                "cross": {**cross, "nearness_RH": nearness},
            }

        def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
            assert read is not None
            x_TD = x_TD + _cross(params["cross"], norm.apply(params["norm"], x_TD), read, crossing)
            return at.run(within, params["within"], x_TD)

        return Block(specs, apply)


class Read(NamedTuple):
    """The hidden text, `[T, D]`, and the places of it that each token reads, int64 `[T, R]`, T for none."""

    hidden_TD: Tensor
    place_TR: Tensor


class Scores(NamedTuple):
    """What is heard, written and spoken next: `[T, V]`, `[T, V]`, `[T, K]`, each of use at its track's tokens."""

    hears_TV: Tensor
    writes_TV: Tensor
    speaks_TK: Tensor


def specs(cfg: Talker) -> dict[str, Any]:
    """`below`, `trunk`, `above`."""
    gain = (2 * cfg.above) ** -0.5
    return {
        "below": {
            "frame": linear.specs(cfg.window, cfg.d, ("frequency", "embed"), bias=True),
            "stack": encoder_stack.specs(cfg.hearing),
            "text": linear.specs(cfg.d, cfg.vocab, ("embed", "vocab"), bias=True),
        },
        "trunk": decoder.specs(cfg.writing),
        "above": {
            "unit": embedding.specs(cfg.units + 1, cfg.d),
            "layers": [cfg.speaking().specs(gain) for _ in range(cfg.above)],
            "norm": norm.specs(cfg.d),
            "head": linear.specs(cfg.d, cfg.units, ("embed", "codebook"), init=Normal(0.02)),
        },
    }


def scores(params: Tree, batch: Mapping[str, Any], cfg: Talker) -> Scores:
    """Of a pack as `experiments.stream.talk.lay` makes it."""
    frames_TD = linear.apply(params["below"]["frame"], batch["heard_TW"])
    heard_TD = encoder_stack.apply(
        params["below"]["stack"],
        frames_TD,
        positions=batch["positions_T"],
        segments_T=batch["tracks_T"],
        cfg=cfg.hearing,
    )
    hears_TV = linear.apply(params["below"]["text"], heard_TD)
    soft_TD = hears_TV.softmax(-1) @ params["trunk"]["embedding"]["table_VD"]
    written_TD = decoder.embed(params["trunk"], batch["text_T"])
    hidden_TD, _ = decoder.apply(
        params["trunk"],
        torch.where((batch["track_T"] == HEARS)[:, None], soft_TD, written_TD),
        positions=batch["positions_T"],
        segments=batch["talks_T"],
        cfg=cfg.writing,
    )
    writes_TV = decoder.logits(params["trunk"], hidden_TD, cfg.writing)
    return Scores(hears_TV, writes_TV, _spoken(params["above"], hidden_TD, batch, cfg))


def _spoken(params: Tree, hidden_TD: Tensor, batch: Mapping[str, Any], cfg: Talker) -> Tensor:
    layer = cfg.speaking(Read(hidden_TD, batch["reads_TR"]))
    at = Context(batch["positions_T"], segments_T=batch["tracks_T"])
    x_TD = embedding.apply(params["unit"], batch["spoken_T"])
    for i, own in enumerate(params["layers"]):
        x_TD = at.run_layer(layer, own, x_TD, layer=i)
    return linear.apply(params["head"], norm.apply(params["norm"], x_TD))


def _cross(params: Tree, x_TD: Tensor, read: Read, cfg: AttentionConfig) -> Tensor:
    """Each token's attention to the few that it reads, the latest first; of none zeros."""
    q_THC, _, _ = attention.project(params, x_TD, cfg, None)
    _, k_THC, v_THC = attention.project(params, read.hidden_TD, cfg, None)
    rows = take_rows(torch.cat([k_THC, v_THC], -1).flatten(1), read.place_TR.flatten())
    k_TRHC, v_TRHC = rows.unflatten(0, read.place_TR.shape).unflatten(-1, (cfg.heads, -1)).chunk(2, -1)
    match_TRH = (q_THC[:, None] * k_TRHC).sum(-1) * cfg.head_dim**-0.5 + params["nearness_RH"]
    there_TR1 = (read.place_TR < pack_tokens(len(x_TD)))[..., None]
    share_TRH = match_TRH.masked_fill(~there_TR1, -1e30).softmax(1) * there_TR1
    return attention.output(params, (share_TRH[..., None] * v_TRHC).sum(1))


def loss_terms(params: Tree, batch: Mapping[str, Any], cfg: Talker) -> dict[str, Mean]:
    """`hears` (nats of a heard letter), `writes` (of a written one), `speaks` (of a unit)."""
    found = scores(params, batch, cfg)
    return {
        "hears": ctc_loss(found.hears_TV, Transcripts(**batch["said"]), blank=cfg.blank),
        "writes": _next(found.writes_TV, batch["next_text_T"]),
        "speaks": _next(found.speaks_TK, batch["next_unit_T"]),
    }


def _next(scores_TV: Tensor, label_T: Tensor) -> Mean:
    nats_T = torch.nn.functional.cross_entropy(scores_TV, label_T, reduction="none", ignore_index=decoder.IGNORE)
    return Mean(nats_T.sum(), (label_T != decoder.IGNORE).sum().to(nats_T.dtype))
