"""Speech of a batch made ready for a talker, on the host: which turns are spoken, and their lines packed.

Raw leaves: "speech" `[F, G]`, integers, the codes of the frames of all spoken turns; "speech_frames" `[a]`, how many
frames each turn of an assistant has, 0 for one that is not spoken; "speech_voices" `[a]`, the voice of each: a first
code in Qwen3-Omni, a word in Qwen2.5-Omni. What goes out has shapes that follow from budgets alone.

Legend: T tokens of the thinker, S tokens of the talker, a turns of assistants, F frames, G codes of a frame, N rows of
frames, M rows of states.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ftrain.kernels.documents import Documents, ids_of
from ftrain.modules.dealing import eased
from ftrain.modules.packing import padding
from ftrain.modules.speech_lines import NOTHING, ChatIds, CodeIds, Line, Thought, Turn, Utterance
from ftrain.sharding.batch import BatchRows, BatchRule, TokenIndices

SPEECH, FRAMES, VOICES = "speech", "speech_frames", "speech_voices"
LEAVES = (SPEECH, FRAMES, VOICES)
_LEAST = 32  # rows of a part where few shapes are to occur
RULES: Mapping[str, BatchRule] = MappingProxyType(
    {
        "speech.frames.*": BatchRows(optional=True),
        "speech.frames.index": TokenIndices(optional=True),
        "speech.states.*": TokenIndices(optional=True),
    }
)
"""How ranks share what `prepare` makes; all other leaves have one entry per token."""


@dataclass(frozen=True)
class SpeechConfig:
    """How a model's conversations become lines: `line` (`ftrain.modules.speech_lines`), with the ids `chat` and
    `codes`; `groups` codes of a frame, each of `sounds`; voices are ids below `voices`.
    """

    line: Callable[[Utterance, Thought, ChatIds, CodeIds], Line]
    chat: ChatIds
    codes: CodeIds
    groups: int
    sounds: int
    voices: int


def prepare(
    raw: Mapping[str, Any],
    seen: Mapping[str, Any],
    cfg: SpeechConfig,
    *,
    tokens: int | None = None,
    frames: int | None = None,
    states: int | None = None,
    packs: int = 1,
    parts: int = 1,
    easily: bool = False,
) -> dict[str, Any]:
    """The talker's batch, "speech" of the whole one.

    Args:
        raw: "tokens" `[T]` of packs, one after the other, "segments", and the leaves of speech.
        seen: "positions" `[T, 3]` and "replaced" `[T]` of the thinker (`ftrain.modules.vision_media.prepare`).
        cfg: the model's.
        tokens: of the talker for each pack; None: as many as the thinker has. Another number does for one device.
        frames, states: rows of frames and of states for each pack; None: as many as the pack with the most needs.
        packs: how many equal packs the tokens are.
        parts: the ranks that share a pack.
        easily: rooms that are not given are somewhat larger, so that few shapes occur.

    Returns:
        "words" int64 `[S]`, ids of the thinker, below 0 for media; "codes" and "labels" int64 `[S]`, the first code of
        each token (below 0 for none) and the one behind it (-100 for none); "positions" `[S, 3]`; "segments",
        `Documents`; "frames": "codes" `[N, G]` and "index" `[N]`, the talker's token of each; "states": "source" `[M]`,
        the thinker's token whose state is read, and "index" `[M]`, the talker's token that reads it.

    Raises:
        ValueError: speech is not of the assistants' turns, a code is none, a turn that is spoken says nothing, or a
            pack has no room.
    """
    spoken = utterances(raw, cfg, packs=packs)
    thought = Thought(
        raw["tokens"].cpu().numpy(), seen["positions"].cpu().numpy(), seen["replaced"].cpu().numpy().astype(bool)
    )
    lines = [[cfg.line(one, thought, cfg.chat, cfg.codes) for one in own] for own in spoken]
    size = len(thought.tokens_T) // packs if tokens is None else tokens
    for number, own in enumerate(lines):
        needed = sum(len(line.word_s) for line in own)
        if needed > size:
            raise ValueError(
                f"the speech of pack {number} needs {needed} tokens of the talker, for which {size} have no room: give "
                "a pack more tokens, or fewer or shorter spoken turns"
            )
    room = {
        "frames": _room("frames", [sum(line.frames for line in own) for own in lines], frames, parts, easily),
        "states": _room(
            "states", [sum(int((x.state_s >= 0).sum()) for x in own) for own in lines], states, parts, easily
        ),
    }
    made = _laid(lines, spoken, size, room, cfg, thought_tokens=len(thought.tokens_T))
    found = {name: _tensors(leaf) for name, leaf in made.items()}
    return {**found, "segments": Documents.of(found["segments"], packs=packs)}


def _room(what: str, needed: Sequence[int], given: int | None, parts: int, easily: bool) -> int:
    most = max(1, *needed)
    if given is None:
        each = -(-most // parts)
        return (eased(max(_LEAST, each)) if easily else each) * parts
    if given < most or given % parts:
        raise ValueError(
            f"a pack's speech has {most} {what}, for which {what}={given} in {parts} equal parts have no room: raise it"
        )
    return given


def utterances(raw: Mapping[str, Any], cfg: SpeechConfig, *, packs: int = 1) -> list[list[Utterance]]:
    """The turns of each pack that are spoken, in their order. ValueError as `prepare`."""
    tokens_T = raw["tokens"].cpu().numpy()
    if tokens_T.ndim != 1 or len(tokens_T) % packs:
        raise ValueError(f"tokens {list(tokens_T.shape)} are not {packs} equal packs, one after the other")
    found = list(_turns(tokens_T, _bounds(raw, tokens_T, packs), cfg.chat))
    told = [(turns, i) for turns in found for i, turn in enumerate(turns) if turn.role == cfg.chat.assistant]
    speech_FG, length_a, voice_a = _speech(raw, len(told), cfg)
    ends = np.concatenate([[0], length_a.cumsum()])
    spoken: list[list[Utterance]] = [[] for _ in range(packs)]
    for number, (turns, i) in enumerate(told):
        if length_a[number]:
            own = Utterance(tuple(turns[: i + 1]), int(voice_a[number]), speech_FG[ends[number] : ends[number + 1]])
            spoken[turns[i].first * packs // len(tokens_T)].append(own)
    return spoken


def _bounds(raw: Mapping[str, Any], tokens_T: np.ndarray, packs: int) -> np.ndarray:
    """Where documents begin, and the end of the last; packs begin with one."""
    new_T = np.zeros(len(tokens_T), bool)
    new_T[:: max(1, len(tokens_T) // packs)] = True
    if raw.get("segments") is not None:
        ids_T = ids_of(raw["segments"]).cpu().numpy()
        new_T[1:] |= ids_T[1:] != ids_T[:-1]
    return np.append(np.flatnonzero(new_T), len(tokens_T))


def _turns(tokens_T: np.ndarray, bounds: np.ndarray, chat: ChatIds) -> list[list[Turn]]:
    """The turns of each document."""
    found = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        firsts = (begin + np.flatnonzero(tokens_T[begin:end] == chat.turn)).tolist()
        roles = [int(tokens_T[first + 1]) if first + 1 < end else NOTHING for first in firsts]
        found.append([Turn(*turn) for turn in zip(roles, firsts, [*firsts, end][1:], strict=True)])
    return found


def _speech(raw: Mapping[str, Any], turns: int, cfg: SpeechConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames of all turns, and of each turn its frames and its voice; checked."""
    missing = [name for name in LEAVES if name not in raw]
    if missing:
        raise ValueError(f"the batch has speech and no {missing[0]!r}: give {', '.join(LEAVES)}")
    speech, length_a, voice_a = (raw[name].cpu() for name in LEAVES)
    if len(length_a) != turns or length_a.shape != voice_a.shape:
        raise ValueError(
            f"the batch has {turns} turns of an assistant, {FRAMES} {list(length_a.shape)} and {VOICES} "
            f"{list(voice_a.shape)}: give a number of each for every such turn, 0 frames where it is not spoken"
        )
    if speech.dim() != 2 or speech.shape[1] != cfg.groups or speech.is_floating_point():
        raise ValueError(
            f"{SPEECH} is {speech.dtype} {list(speech.shape)}: give integers [frames, {cfg.groups}], all codes of each "
            "frame"
        )
    for name, told_a in ((FRAMES, length_a), (VOICES, voice_a)):
        if told_a.numel() and told_a.is_floating_point():
            raise ValueError(f"{name} is {told_a.dtype}: give integers")
    strange_a = (length_a > 0) & ((voice_a < 0) | (voice_a >= cfg.voices))
    if bool(strange_a.any()):
        turn = int(strange_a.nonzero()[0])
        raise ValueError(f"{VOICES} of turn {turn} is {int(voice_a[turn])}: ids of voices are 0 to {cfg.voices - 1}")
    if bool((length_a < 0).any()) or int(length_a.sum()) != len(speech):
        raise ValueError(f"{FRAMES} {length_a.tolist()} are not the turns of {len(speech)} frames of {SPEECH!r}")
    wrong_F = ((speech < 0) | (speech >= cfg.sounds)).any(1)
    if bool(wrong_F.any()):
        frame = int(wrong_F.nonzero()[0])
        raise ValueError(f"frame {frame} of {SPEECH!r} is {speech[frame].tolist()}: codes are 0 to {cfg.sounds - 1}")
    return speech.numpy().astype(np.int64), length_a.numpy(), voice_a.numpy()


def _laid(
    lines: Sequence[Sequence[Line]],
    spoken: Sequence[Sequence[Utterance]],
    size: int,
    room: Mapping[str, int],
    cfg: SpeechConfig,
    *,
    thought_tokens: int,
) -> dict[str, Any]:
    """The leaves of all packs, one after the other."""
    packs = len(lines)
    total, kind = size * packs, next((line.place_s3.dtype for own in lines for line in own), np.dtype(np.int64))
    made: dict[str, Any] = {
        "words": np.full(total, cfg.chat.pad),
        "codes": np.full(total, NOTHING),
        "labels": np.full(total, -100),
        "segments": np.zeros(total, np.int64),
        "positions": np.zeros((total, 3), kind),
    }
    rows, reads = room["frames"] * packs, room["states"] * packs
    frames = {"codes": np.full((rows, cfg.groups), NOTHING), "index": np.full(rows, total)}
    states = {"source": np.full(reads, thought_tokens), "index": np.full(reads, total)}
    first = 0
    for pack, (own, said) in enumerate(zip(lines, spoken, strict=True)):
        at, row, read = pack * size, pack * room["frames"], pack * room["states"]
        for line, one in zip(own, said, strict=True):
            here = slice(at, at + len(line.word_s))
            made["words"][here], made["codes"][here], made["labels"][here] = line.word_s, line.code_s, line.label_s
            made["positions"][here], made["segments"][here] = line.place_s3, first
            of_frames, seen_s = slice(row, row + line.frames), np.flatnonzero(line.state_s >= 0)
            frames["codes"][of_frames] = one.frames_FG
            frames["index"][of_frames] = np.arange(here.stop - line.frames, here.stop)
            of_states = slice(read, read + len(seen_s))
            states["source"][of_states], states["index"][of_states] = line.state_s[seen_s], at + seen_s
            at, row, read, first = here.stop, of_frames.stop, of_states.stop, first + 1
        end = (pack + 1) * size
        longest = max((len(line.word_s) for line in own), default=size)
        made["segments"][at:end], place = padding(end - at, longest, first)
        made["positions"][at:end] = place[:, None]
        first = int(made["segments"][at:end].max(initial=first)) + 1
    return {**made, "frames": frames, "states": states}


def _tensors(leaf: Any) -> Any:
    return {name: _tensors(x) for name, x in leaf.items()} if isinstance(leaf, dict) else torch.from_numpy(leaf)
