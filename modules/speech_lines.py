"""What a talker reads of a conversation to speak a turn of it: a line of tokens, of Qwen3-Omni or Qwen2.5-Omni.

A line is the conversation as its talker has it, a few tokens that begin speech, and a token for each frame, beside
which the words that are spoken go on. Numpy on the host.

Legend: T tokens of the thinker, s tokens of a line, F frames, G codes of a frame, n words.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ROLE = 3
"""Tokens before what a turn says: where it begins, whose it is, a new line."""
NOTHING = -1
"""In the place of a word, a state or a code that is not there."""


@dataclass(frozen=True)
class ChatIds:
    """Ids of the thinker: `turn` and `end_of_turn` around each turn, the roles `user` and `assistant` behind `turn`,
    and the words `begin`, `end` and `pad` beside speech.
    """

    begin: int
    end: int
    pad: int
    turn: int = 151644
    end_of_turn: int = 151645
    user: int = 872
    assistant: int = 77091


@dataclass(frozen=True)
class CodeIds:
    """First codes that are no sound: `begin` and `end` of speech, `pad`; and `silent`, those between the role and the
    voice of Qwen3-Omni, which say that nothing is thought.
    """

    begin: int
    end: int
    pad: int
    silent: tuple[int, ...] = ()


class Turn(NamedTuple):
    """The tokens `[first, end)` of a turn, whose `role` is an id."""

    role: int
    first: int
    end: int


class Utterance(NamedTuple):
    """A turn that is spoken: the `turns` of its conversation up to it, its `voice`, and its frames, int64 `[F, G]`."""

    turns: tuple[Turn, ...]
    voice: int
    frames_FG: np.ndarray


class Thought(NamedTuple):
    """What is known of the thinker's tokens: ids int64 `[T]`, places `[T, 3]`, and where media stand, bool `[T]`."""

    tokens_T: np.ndarray
    place_T3: np.ndarray
    media_T: np.ndarray


class Line(NamedTuple):
    """Of each token: its word, the token of the thinker whose state is read, its first code, int64 `[s]`, each
    `NOTHING` where there is none; its places `[s, 3]`; and the first code that is to come behind it, -100 for none.

    `frames`: how many tokens at the end are frames. `words_n`: those that stand beside frames that are still to come.
    """

    word_s: np.ndarray
    state_s: np.ndarray
    code_s: np.ndarray
    place_s3: np.ndarray
    label_s: np.ndarray
    frames: int
    words_n: np.ndarray
    states_n: np.ndarray


def qwen3_line(said: Utterance, thought: Thought, chat: ChatIds, codes: CodeIds) -> Line:
    """The user's turns, of whose media states are read; the role of the turn; six tokens in which codes tell the voice,
    beside the first word in the last of them; and frames beside the other words.

    ValueError for a turn that says nothing.
    """
    users = [np.arange(turn.first, turn.end) for turn in said.turns if turn.role == chat.user]
    own_n, begin = content(said, thought, chat), said.turns[-1].first
    read_u = np.concatenate([np.zeros(0, np.int64), *users])
    media_u = thought.media_T[read_u]
    spoken_n = np.append(thought.tokens_T[own_n[1:]], chat.end)
    prefix_s = [*thought.tokens_T[begin : begin + ROLE], *[chat.pad] * 4, chat.begin, thought.tokens_T[own_n[0]]]
    code_s = [NOTHING] * ROLE + [*codes.silent, said.voice, codes.pad, codes.begin]
    base, places = 0, [np.zeros((0, 3), thought.place_T3.dtype)]
    for span in users:
        place = thought.place_T3[span]
        places.append(place - place[0] + base)
        base += place.max() - place[0].max() + 1
    return _line(
        np.concatenate([np.where(media_u, NOTHING, thought.tokens_T[read_u]), prefix_s]),
        np.concatenate([np.where(media_u, read_u, NOTHING), np.full(len(prefix_s), NOTHING)]),
        np.concatenate([np.full(len(read_u), NOTHING), code_s]),
        np.concatenate(places),
        base,
        said,
        codes,
        Beside(spoken_n, np.full(len(spoken_n), NOTHING), chat.pad),
    )


def qwen2_5_line(said: Utterance, thought: Thought, chat: ChatIds, codes: CodeIds) -> Line:
    """All of the conversation before what the turn says, states and words, of media states alone; the voice, which is a
    word here; the first word; and frames beside the other words.

    ValueError for a turn that says nothing.
    """
    own_n, begin = content(said, thought, chat), said.turns[0].first
    before_u = np.arange(begin, own_n[0])
    word_u = np.where(thought.media_T[before_u], NOTHING, thought.tokens_T[before_u])
    place_u3 = thought.place_T3[before_u] - thought.place_T3[begin]
    return _line(
        np.concatenate([word_u, [said.voice, thought.tokens_T[own_n[0]]]]),
        np.concatenate([before_u, [NOTHING, own_n[0]]]),
        np.concatenate([np.full(len(before_u), NOTHING), [codes.pad, codes.begin]]),
        place_u3,
        place_u3[-1].max() + 1,
        said,
        codes,
        Beside(np.append(thought.tokens_T[own_n[1:]], chat.end), np.append(own_n[1:], NOTHING), chat.pad),
    )


def content(said: Utterance, thought: Thought, chat: ChatIds) -> np.ndarray:
    """The tokens of what a turn says, int64 `[n]`, without its role and its end. ValueError where it says nothing."""
    turn = said.turns[-1]
    own_n = np.arange(turn.first + ROLE, turn.end)
    ends = np.flatnonzero(thought.tokens_T[own_n] == chat.end_of_turn)
    own_n = own_n[: ends[0]] if len(ends) else own_n
    if not len(own_n):
        raise ValueError(
            f"the turn that begins at token {turn.first} says nothing and has speech of {len(said.frames_FG)} frames: "
            "speech needs a word, so leave its frames out"
        )
    return own_n


class Beside(NamedTuple):
    """The words beside frames, `[n]`, the tokens whose states are read with them, and the word behind the last."""

    word_n: np.ndarray
    state_n: np.ndarray
    pad: int


def _line(
    word_p: np.ndarray,
    state_p: np.ndarray,
    code_p: np.ndarray,
    place_p3: np.ndarray,
    base: float,
    said: Utterance,
    codes: CodeIds,
    beside: Beside,
) -> Line:
    """What comes before the frames, whose places from `base` on are counted, and the frames."""
    first_F = said.frames_FG[:, 0]
    frames, before = len(first_F), len(word_p)
    missing = max(0, frames - len(beside.word_n))
    word_F = np.concatenate([beside.word_n[:frames], np.full(missing, beside.pad)])
    state_F = np.concatenate([beside.state_n[:frames], np.full(missing, NOTHING)])
    more_s = base + np.arange(before + frames - len(place_p3))
    label_s = np.full(before + frames, -100)
    if frames:
        label_s[before - 1 :] = np.append(first_F, codes.end)
    return Line(
        np.concatenate([word_p, word_F]).astype(np.int64),
        np.concatenate([state_p, state_F]).astype(np.int64),
        np.concatenate([code_p, first_F]).astype(np.int64),
        np.concatenate([place_p3, more_s[:, None].repeat(3, axis=1).astype(place_p3.dtype)]),
        label_s,
        frames,
        beside.word_n[frames:],
        beside.state_n[frames:],
    )
