"""A thinker that writes and a talker that speaks it, in one step: a loss of each, and the gradient between them by
choice.

Legend: T tokens of the thinker, S tokens of the talker, W width of the thinker, D width of the talker, M rows of
states, G codes of a frame.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ftrain.kernels.documents import Segments
from ftrain.kernels.embedding import merge_rows
from ftrain.kernels.mean import Mean
from ftrain.kernels.pack import take_rows
from ftrain.modules import decoder, vision_language
from ftrain.modules.decoder import DecoderStats
from ftrain.modules.sight_generation import on_device
from ftrain.modules.spec import Tree
from ftrain.modules.speech_lines import Thought, Utterance
from ftrain.modules.speech_packs import FRAMES, SPEECH, VOICES, utterances
from ftrain.modules.talker import Talker
from ftrain.modules.talker_generation import Utterance as Asked
from ftrain.modules.vision_language import VisionLanguageConfig


@dataclass(frozen=True)
class TalkingConfig:
    """A `thinker` and its `talker`. `flows`: the gradient of speech goes on into the thinker; else it ends at the
    thinker's rows, and the talker is trained beside it.

    ValueError where the talker reads a stream that the thinker has not.
    """

    thinker: VisionLanguageConfig
    talker: Talker
    flows: bool = False

    def __post_init__(self) -> None:
        if self.talker.layer > self.thinker.text.layers:
            raise ValueError(
                f"the talker reads the stream behind layer {self.talker.layer} of a thinker of "
                f"{self.thinker.text.layers} layers"
            )


class Told(NamedTuple):
    """The losses of a step by their names ("text", and of the talker "codes" and "residuals"), and what the routers of
    the thinker and of the talker did (None where nothing was spoken).
    """

    losses: dict[str, Mean]
    thinker: DecoderStats
    talker: DecoderStats | None


def specs(cfg: TalkingConfig) -> Tree:
    """`thinker` (`vision_language.specs`) and `talker`."""
    return {"thinker": vision_language.specs(cfg.thinker), "talker": cfg.talker.specs}


def rows(thinker: Tree, state_TW: Tensor, speech: Mapping[str, Any]) -> Tensor:
    """The thinker's rows beside each of the talker's tokens, `[S, W]`: the embedding of its word, and what it reads of
    the stream `state_TW`.

    `thinker`: the parameters of the thinker. `speech`: "words" and "states" of `ftrain.modules.speech_packs.prepare`.
    """
    words_S, states = speech["words"], speech["states"]
    rows_SW = decoder.embed(thinker["text"], words_S.clamp(min=0)).masked_fill(words_S[:, None] < 0, 0)
    read_MW = take_rows(state_TW, states["source"]).to(rows_SW.dtype)
    return rows_SW + merge_rows(torch.zeros_like(rows_SW), read_MW, states["index"])


def losses(params: Tree, batch: Mapping[str, Any], cfg: TalkingConfig, *, segments: Segments | None = None) -> Told:
    """The losses of a batch: of its "labels" `[T]`, the words behind each token, where it has some, and of its
    "speech", where it has some.

    `batch`: what `ftrain.modules.vision_media.prepare` makes, with "speech" of `ftrain.modules.speech_packs.prepare`;
    `segments`: the documents of the thinker's tokens. ValueError for a batch with neither labels nor speech.
    """
    thinker, speech = params["thinker"], batch.get("speech")
    hidden_TW, stats = vision_language.hidden(thinker, batch, cfg.thinker, segments=segments, keep=(cfg.talker.layer,))
    found, spoken = dict[str, Mean](), None
    if batch.get("labels") is not None:
        found["text"] = decoder.loss(thinker["text"], hidden_TW, batch["labels"], cfg.thinker.text)
    if speech is not None:
        (state_TW,) = stats.kept
        rows_SW = rows(thinker, state_TW, speech)
        given = {**speech, "rows": rows_SW if cfg.flows else rows_SW.detach()}
        hidden_SD, spoken = cfg.talker.hidden(params["talker"], given, segments=speech["segments"])
        found |= cfg.talker.losses(params["talker"], hidden_SD, given)
    if not found:
        raise ValueError("a loss needs the batch's 'labels', or its 'speech'")
    return Told(found, stats, spoken)


@torch.no_grad()
def to_speak(params: Tree, batch: Mapping[str, Any], cfg: TalkingConfig, *, voice: int) -> Asked:
    """What the talker is given to speak the last turn of one document, which is an assistant's.

    `batch`: what `ftrain.modules.vision_media.prepare` makes of a document, with its answer. `voice`: see
    `ftrain.modules.speech_packs`. ValueError where the last turn says nothing, or is another's.
    """
    speech, line_of = cfg.talker.speech, cfg.talker.speech.line
    thought = Thought(*(batch[name].cpu().numpy() for name in ("tokens", "positions", "replaced")))
    line = line_of(_last(batch, cfg, voice), thought, speech.chat, speech.codes)
    _, stats = vision_language.hidden(params["thinker"], batch, cfg.thinker, keep=(cfg.talker.layer,))
    (state_TW,) = stats.kept

    def read(word_n: np.ndarray, state_n: np.ndarray) -> Tensor:
        at_M = np.flatnonzero(state_n >= 0)
        states = {"source": torch.from_numpy(state_n[at_M]), "index": torch.from_numpy(at_M)}
        given = {"words": torch.from_numpy(word_n), "states": states}
        return rows(params["thinker"], state_TW, on_device(given, state_TW.device))

    prompt = {"words": line.word_s, "codes": line.code_s, "positions": line.place_s3}
    found = {name: torch.from_numpy(leaf).to(state_TW.device) for name, leaf in prompt.items()}
    pad_1, none_1 = np.array([speech.chat.pad]), np.array([-1])
    return Asked(
        {**found, "rows": read(line.word_s, line.state_s)},
        read(line.words_n, line.states_n),
        read(pad_1, none_1)[0],
    )


def _last(batch: Mapping[str, Any], cfg: TalkingConfig, voice: int) -> Utterance:
    """The last turn of a document, without frames yet."""
    speech = cfg.talker.speech
    tokens_T = batch["tokens"].cpu()
    turns = int(((tokens_T[:-1] == speech.chat.turn) & (tokens_T[1:] == speech.chat.assistant)).sum())
    if not turns:
        raise ValueError("the document has no turn of an assistant to speak")
    frames = torch.zeros(turns, dtype=torch.int64)
    frames[-1] = 1
    raw = {"tokens": tokens_T, SPEECH: torch.zeros(1, speech.groups, dtype=torch.int64), FRAMES: frames}
    (said,) = utterances({**raw, VOICES: torch.full((turns,), voice)}, speech)[0]
    if (tokens_T[said.turns[-1].end :] == speech.chat.turn).any():
        raise ValueError("the last turn of the document is not an assistant's: give the document with its answer")
    return said._replace(frames_FG=np.zeros((0, speech.groups), np.int64))
