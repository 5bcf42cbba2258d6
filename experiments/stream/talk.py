"""Packs of talks, and talking: text and speech are made at the same time, the speech a little behind.

A talk has as many tokens as all others: the frames of the question, the answer's letters, its units. A unit reads the
last few tokens of the text that is written by then: `LEAD` before the first unit, one more for every `PACE` units.

Legend: B talks, T tokens of the pack, L frames, A places of text, U units, R tokens that a unit reads, W numbers.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.stream.model import HEARS, SPEAKS, WRITES, Talker, scores
from experiments.stream.words import BLANK, BOS, CODES, EOS, FRAMES, NUMBERS, PAD, UNITS, VOCAB, WINDOW, Said, letters
from ftrain.modules.decoder import IGNORE
from ftrain.modules.packed_ctc import lay as lay_transcripts
from ftrain.modules.spec import Tree
from ftrain.sharding.batch import BatchRows, TokenIndices

TEXT = max(map(len, NUMBERS)) + 2
LENGTH = FRAMES + TEXT + UNITS
LEAD, PACE = 3, 2
READS = 5
TALKER = Talker(WINDOW, VOCAB, BLANK, CODES, READS)
RULES = {
    "said.place_BL": TokenIndices(),
    "said.text_BN": BatchRows(),
    "said.length_B": BatchRows(),
    "reads_TR": TokenIndices(),
}
"""How ranks share a pack; all other leaves have one entry per token."""


def answers(number_B: np.ndarray) -> np.ndarray:
    """The number that each is answered with."""
    return (number_B + 1) % len(NUMBERS)


def lay(heard_BLW: np.ndarray, asked: list[str], replies: list[str], units_BU: np.ndarray) -> dict[str, Any]:
    """The pack of so many talks: what is heard, what it says, the reply in letters and in units.

    ValueError for a reply that has no room, and for talks that differ in number.
    """
    talks = len(heard_BLW)
    if not len(asked) == len(replies) == len(units_BU) == talks or any(len(reply) + 2 > TEXT for reply in replies):
        raise ValueError(f"{talks} talks need as many words and units, and replies of at most {TEXT - 2} letters")
    text_BA = np.full((talks, TEXT), PAD)
    for own, reply in zip(text_BA, replies, strict=True):
        own[: len(reply) + 2] = [BOS, *letters(reply), EOS]
    before_BU = np.concatenate([np.full((talks, 1), CODES), units_BU[:, :-1]], 1)
    heard = np.zeros((talks, LENGTH, WINDOW), np.float32)
    heard[:, :FRAMES] = heard_BLW
    tracks = np.repeat([HEARS, WRITES, SPEAKS], [FRAMES, TEXT, UNITS])
    talk = np.arange(talks)[:, None]
    places = [range(at * LENGTH, at * LENGTH + FRAMES) for at in range(talks)]
    said = lay_transcripts(places, [letters(word) for word in asked], tokens=talks * LENGTH, length=TEXT - 2)
    made = {
        "heard_TW": heard,
        "track_T": np.tile(tracks, (talks, 1)),
        "tracks_T": talk * 3 + tracks,
        "talks_T": talk * 2 + (tracks == SPEAKS),
        "positions_T": np.tile(np.concatenate([np.arange(FRAMES + TEXT), np.arange(UNITS)]), (talks, 1)),
        "text_T": _row(talks, PAD, text_BA, WRITES),
        "next_text_T": _row(talks, IGNORE, _following(text_BA), WRITES),
        "spoken_T": _row(talks, 0, before_BU, SPEAKS),
        "next_unit_T": _row(talks, IGNORE, units_BU, SPEAKS),
        "reads_TR": reads(text_BA),
    }
    return {**{name: torch.from_numpy(x.reshape(-1, *x.shape[2:])) for name, x in made.items()}, "said": said._asdict()}


def _row(talks: int, fill: int, values: np.ndarray, track: int) -> np.ndarray:
    found = np.full((talks, LENGTH), fill)
    start = (0, FRAMES, FRAMES + TEXT)[track]
    found[:, start : start + values.shape[1]] = values
    return found


def _following(text_BA: np.ndarray) -> np.ndarray:
    later = np.concatenate([text_BA[:, 1:], np.full((len(text_BA), 1), PAD)], 1)
    return np.where(later == PAD, IGNORE, later)


def reads(text_BA: np.ndarray) -> np.ndarray:
    """The places of the text that each unit reads, `[B, LENGTH, R]`; the number of tokens for none."""
    talks, nothing = len(text_BA), len(text_BA) * LENGTH
    found = np.full((talks, LENGTH, READS), nothing)
    for unit in range(UNITS):
        last = unit // PACE + LEAD
        for slot in range(READS):
            token = last - slot
            if 0 <= token < TEXT:
                place = np.arange(talks) * LENGTH + FRAMES + token
                found[:, FRAMES + TEXT + unit, slot] = np.where(text_BA[:, token] == PAD, nothing, place)
    return found


def batch_of(said: Said, chosen_B: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Training talks of these clips: the question, and for an answer a clip of the same voice, if it has one."""
    number_B = said.number_N[chosen_B]
    reply_B = answers(number_B)
    units = []
    for clip, reply in zip(chosen_B, reply_B, strict=True):
        same = np.flatnonzero((said.number_N == reply) & (said.voices == said.voices[clip]))
        units.append(said.units_NU[rng.choice(same)])
    heard = said.heard_NLW[chosen_B] + rng.normal(scale=0.03, size=(len(chosen_B), FRAMES, WINDOW))
    asked, replies = ([NUMBERS[n] for n in numbers] for numbers in (number_B, reply_B))
    return lay(heard.astype(np.float32), asked, replies, np.stack(units))


def talk(params: Tree, heard_BLW: np.ndarray, cfg: Talker) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
    """What is heard (the best token of each frame), and the reply, its tokens and its units `[B, U]`, greedily.

    A unit is spoken as soon as the text that it reads is there, while the rest of the text is not.
    """
    talks = len(heard_BLW)
    text_BA, units_BU = np.full((talks, TEXT), PAD), np.zeros((talks, UNITS), np.int64)
    text_BA[:, 0] = BOS
    heard: list[list[int]] = []
    written = 0
    for unit in range(UNITS):
        while written < min(unit // PACE + LEAD, TEXT - 1):
            hears_TV, writes_TV, _ = _now(params, heard_BLW, text_BA, units_BU, cfg)
            new_B = writes_TV[:, FRAMES + written].argmax(-1).numpy()
            ended_B = np.isin(text_BA[:, written], (EOS, PAD))
            written += 1
            text_BA[:, written] = np.where(ended_B, PAD, new_B)
            heard = hears_TV[:, :FRAMES].argmax(-1).tolist()
        units_BU[:, unit] = (
            _now(params, heard_BLW, text_BA, units_BU, cfg)[2][:, FRAMES + TEXT + unit].argmax(-1).numpy()
        )
    return heard, text_BA.tolist(), units_BU


def _now(
    params: Tree, heard_BLW: np.ndarray, text_BA: np.ndarray, units_BU: np.ndarray, cfg: Talker
) -> tuple[Tensor, ...]:
    """The scores `[B, LENGTH, ...]` with what is written and spoken so far."""
    talks = len(heard_BLW)
    batch = lay(heard_BLW, [""] * talks, [""] * talks, units_BU)
    batch["text_T"] = torch.from_numpy(_row(talks, PAD, text_BA, WRITES)).flatten()
    batch["reads_TR"] = torch.from_numpy(reads(text_BA)).flatten(0, 1)
    with torch.no_grad():
        found = scores(params, batch, cfg)
    return tuple(x.unflatten(0, (talks, -1)) for x in found)
