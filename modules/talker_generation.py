"""Speech of Qwen3-Omni's talker, frame by frame: a first code, the codes behind it, and the next word beside them.

Legend: B samples, S tokens of all prompts, W width of the thinker, D width of the talker, G codes of a frame, R
behind the first, V first codes, n words that are still to be spoken.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.modules import code_predictor, decoder
from ftrain.modules.families import qwen3_omni_talker as talker
from ftrain.modules.families.qwen3_omni_talker import TalkerConfig
from ftrain.modules.kv_cache import KvCache
from ftrain.modules.sampling import Sampling, choose
from ftrain.modules.spec import Tree


class Utterance(NamedTuple):
    """What is to be spoken: `prompt`, the leaves of `qwen3_omni_talker.hidden` of one document without frames, `words`
    `[n, W]`, the thinker's rows that stand beside the frames to come, and `pad` `[W]`, the row behind them.
    """

    prompt: Mapping[str, Tensor]
    words_nW: Tensor
    pad_W: Tensor


class Choice(NamedTuple):
    """How codes are chosen: `first` and `rest` of a frame (see `Sampling`); `never`: first codes that are not taken;
    `again`: what the scores of first codes that were spoken already are divided by, or, below 0, multiplied by.
    """

    first: Sampling = Sampling()
    rest: Sampling = Sampling()
    never: tuple[int, ...] = ()
    again: float = 1.0


class _Now(NamedTuple):
    hidden_BD: Tensor
    cache: KvCache
    next_B: Tensor


@torch.no_grad()
def speak(
    params: Tree,
    utterances: Sequence[Utterance],
    cfg: TalkerConfig,
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
    now, spoken = _begin(params, utterances, cfg, max_frames), list[Tensor]()
    words = _words(params, utterances, max_frames)
    keys = (None, None) if key is None else tuple(random.split(key, 2).unbind())
    done_B = torch.zeros(len(utterances), dtype=torch.bool, device=now.hidden_BD.device)
    for step in range(max_frames):
        scores_BV = _allowed(talker.logits(params, now.hidden_BD, cfg), spoken, how)
        first_B = choose(scores_BV, keys[0], step, how.first)
        done_B |= first_B == cfg.ids.end
        if bool(done_B.all()):
            break
        first_BD = talker.first_rows(params, first_B)
        drawn = None if keys[1] is None else random.fold_in(keys[1], step)
        rest_BR = code_predictor.generate(
            params["predictor"], now.hidden_BD, first_BD, cfg.predictor, key=drawn, how=how.rest
        )
        spoken.append(torch.cat([first_B[:, None], rest_BR], 1))
        if step + 1 < max_frames:
            x_BD = first_BD + code_predictor.embed(params["predictor"], rest_BR) + words[:, step]
            now = _go_on(params, x_BD, now, cfg)
    return _until_the_end(spoken, len(utterances), cfg)


def _check(utterances: Sequence[Utterance], max_frames: int, key: Tensor | None, how: Choice) -> None:
    lengths = [len(one.prompt["rows"]) for one in utterances]
    if not lengths or 0 in lengths:
        what = f"the prompt of utterance {lengths.index(0)} is empty" if lengths else "there are no utterances"
        raise ValueError(f"{what}: speech needs a prompt before its first frame")
    if max_frames < 0:
        raise ValueError(f"max_frames={max_frames} must be at least 0")
    for sampling in (how.first, how.rest):
        sampling.check_key(key)


def _begin(params: Tree, utterances: Sequence[Utterance], cfg: TalkerConfig, room: int) -> _Now:
    names = utterances[0].prompt
    batch: dict[str, Any] = {name: torch.cat([one.prompt[name] for one in utterances]) for name in names}
    x_SD = talker.embed(params, batch)
    length_B = torch.tensor([len(one.prompt["rows"]) for one in utterances], device=x_SD.device)
    hidden_SD, cache = decoder.prefill(
        params["stack"], x_SD, positions=batch["positions"].mT, length_B=length_B, room=room, cfg=cfg.stack
    )
    last_B = length_B.cumsum(0) - 1
    return _Now(hidden_SD.index_select(0, last_B), cache, batch["positions"].index_select(0, last_B).amax(1) + 1)


def _go_on(params: Tree, x_BD: Tensor, now: _Now, cfg: TalkerConfig) -> _Now:
    place = now.next_B.expand(3, -1)
    hidden_BD, cache = decoder.extend(params["stack"], x_BD, positions=place, cache=now.cache, cfg=cfg.stack)
    return _Now(hidden_BD, cache, now.next_B + 1)


def _words(params: Tree, utterances: Sequence[Utterance], frames: int) -> Tensor:
    """The row beside each frame, `[B, frames, D]`: of the next word, and behind the last one padding."""
    rows = list[Tensor]()
    for one in utterances:
        left = max(0, frames - len(one.words_nW))
        rows.append(torch.cat([one.words_nW[:frames], one.pad_W.expand(left, -1)]))
    return talker.project(params["words"], torch.stack(rows))


def _allowed(scores_BV: Tensor, spoken: Sequence[Tensor], how: Choice) -> Tensor:
    if how.again != 1.0 and spoken:
        said_BN = torch.stack(list(spoken), 1)[..., 0]
        found_BN = scores_BV.gather(1, said_BN)
        less_BN = torch.where(found_BN < 0, found_BN * how.again, found_BN / how.again)
        scores_BV = scores_BV.scatter(1, said_BN, less_BN)
    if how.never:
        never_N = torch.tensor(how.never, device=scores_BV.device)
        scores_BV = scores_BV.index_fill(1, never_N, -torch.inf)
    return scores_BV


def _until_the_end(spoken: Sequence[Tensor], samples: int, cfg: TalkerConfig) -> list[Tensor]:
    if not spoken:
        return [torch.zeros(0, cfg.predictor.groups, dtype=torch.int64) for _ in range(samples)]
    found = []
    for codes_NG in torch.stack(list(spoken), 1).unbind():
        ends = (codes_NG[:, 0] == cfg.ids.end).nonzero()
        found.append(codes_NG[: int(ends[0])] if len(ends) else codes_NG)
    return found
