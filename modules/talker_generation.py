"""Speech, frame by frame: a talker's first code, the codes behind it, and the next word beside them.

Legend: B samples, S tokens of all prompts, W width of the thinker, D width of the talker, G codes of a frame, V first
codes, n words that are still to be spoken.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.modules import decoder
from ftrain.modules.kv_cache import KvCache
from ftrain.modules.sampling import Sampling, choose
from ftrain.modules.spec import Tree
from ftrain.modules.talker import Talker


class Utterance(NamedTuple):
    """What is to be spoken: `prompt`, the leaves of `Talker.hidden` of one document without frames, `words_nW`, the
    thinker's rows that stand beside the frames to come, and `pad_W`, the row behind them.
    """

    prompt: Mapping[str, Tensor]
    words_nW: Tensor
    pad_W: Tensor


class Choice(NamedTuple):
    """How codes are chosen: `first` and `rest` of a frame (see `Sampling`); `never`: first codes that are not taken;
    `again`: what the scores of first codes that were spoken already are divided by, or, below 0, multiplied by, those
    in `said` from the beginning.
    """

    first: Sampling = Sampling()
    rest: Sampling = Sampling()
    never: tuple[int, ...] = ()
    again: float = 1.0
    said: tuple[int, ...] = ()


class _Now(NamedTuple):
    hidden_BD: Tensor
    cache: KvCache
    next_B: Tensor


@torch.no_grad()
def speak(
    params: Tree,
    utterances: Sequence[Utterance],
    talker: Talker,
    *,
    max_frames: int,
    key: Tensor | None = None,
    how: Choice = Choice(),  # noqa: B008  # frozen
) -> list[Tensor]:
    """The codes of each utterance, int64 `[frames, G]`: at most `max_frames`, up to and without the end of speech.

    `key`: int64 `[2]`, where codes are drawn. ValueError without an utterance, for an empty prompt, for `max_frames`
    below 0, and where codes are to be drawn without a key.
    """
    _check(utterances, max_frames, key, how)
    now, spoken = _begin(params, utterances, talker, max_frames), list[Tensor]()
    beside_BFW = _beside(utterances, max_frames)
    first_key, rest_key = (None, None) if key is None else random.split(key, 2).unbind()
    ends_N = torch.tensor(talker.ends, device=now.hidden_BD.device)
    done_B = torch.zeros(len(utterances), dtype=torch.bool, device=now.hidden_BD.device)
    for step in range(max_frames):
        first_B = choose(_allowed(talker.logits(params, now.hidden_BD), spoken, how), first_key, step, how.first)
        done_B |= torch.isin(first_B, ends_N)
        if bool(done_B.all()):
            break
        drawn = None if rest_key is None else random.fold_in(rest_key, step)
        spoken.append(talker.frame(params, now.hidden_BD, first_B, drawn, how.rest))
        if step + 1 < max_frames:
            now = _go_on(params, talker.go_on(params, spoken[-1], beside_BFW[:, step]), now, talker)
    return _until_the_end(spoken, len(utterances), talker)


def _check(utterances: Sequence[Utterance], max_frames: int, key: Tensor | None, how: Choice) -> None:
    lengths = [len(one.prompt["rows"]) for one in utterances]
    if not lengths or 0 in lengths:
        what = f"the prompt of utterance {lengths.index(0)} is empty" if lengths else "there are no utterances"
        raise ValueError(f"{what}: speech needs a prompt before its first frame")
    if max_frames < 0:
        raise ValueError(f"max_frames={max_frames} must be at least 0")
    for sampling in (how.first, how.rest):
        sampling.check_key(key)


def _begin(params: Tree, utterances: Sequence[Utterance], talker: Talker, room: int) -> _Now:
    names = utterances[0].prompt
    batch: dict[str, Any] = {name: torch.cat([one.prompt[name] for one in utterances]) for name in names}
    x_SD = talker.embed(params, batch)
    length_B = torch.tensor([len(one.prompt["rows"]) for one in utterances], device=x_SD.device)
    place = batch["positions"]
    hidden_SD, cache = decoder.prefill(
        params["stack"], x_SD, positions=place.mT, length_B=length_B, room=room, cfg=talker.stack
    )
    last_B = length_B.cumsum(0) - 1
    return _Now(hidden_SD.index_select(0, last_B), cache, place.index_select(0, last_B).amax(1) + 1)


def _go_on(params: Tree, x_BD: Tensor, now: _Now, talker: Talker) -> _Now:
    place = now.next_B.expand(3, -1)
    hidden_BD, cache = decoder.extend(params["stack"], x_BD, positions=place, cache=now.cache, cfg=talker.stack)
    return _Now(hidden_BD, cache, now.next_B + 1)


def _beside(utterances: Sequence[Utterance], frames: int) -> Tensor:
    """The row beside each frame, `[B, frames, W]`: of the next word, and behind the last one padding."""
    rows = list[Tensor]()
    for one in utterances:
        left = max(0, frames - len(one.words_nW))
        rows.append(torch.cat([one.words_nW[:frames], one.pad_W.expand(left, -1)]))
    return torch.stack(rows)


def _allowed(scores_BV: Tensor, spoken: Sequence[Tensor], how: Choice) -> Tensor:
    if how.again != 1.0 and (spoken or how.said):
        before = torch.tensor(how.said, dtype=torch.int64, device=scores_BV.device).expand(len(scores_BV), -1)
        said_BN = torch.cat([before, *(codes_BG[:, :1] for codes_BG in spoken)], 1)
        found_BN = scores_BV.gather(1, said_BN)
        less_BN = torch.where(found_BN < 0, found_BN * how.again, found_BN / how.again)
        scores_BV = scores_BV.scatter(1, said_BN, less_BN)
    if how.never:
        never_N = torch.tensor(how.never, device=scores_BV.device)
        scores_BV = scores_BV.index_fill(1, never_N, -torch.inf)
    return scores_BV


def _until_the_end(spoken: Sequence[Tensor], samples: int, talker: Talker) -> list[Tensor]:
    if not spoken:
        return [torch.zeros(0, talker.speech.groups, dtype=torch.int64) for _ in range(samples)]
    found, ends_N = [], torch.tensor(talker.ends, device=spoken[0].device)
    for codes_NG in torch.stack(list(spoken), 1).unbind():
        ends = torch.isin(codes_NG[:, 0], ends_N).nonzero()
        found.append(codes_NG[: int(ends[0])] if len(ends) else codes_NG)
    return found
