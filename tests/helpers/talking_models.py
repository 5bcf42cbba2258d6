"""Tiny whole models of transformers that think and talk, conversations with speech, and its losses of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftrain.modules.pictures import MediaConfig
from tests.helpers import hearing_families as hearing
from tests.helpers import talking_families as talkers
from tests.helpers.seeing_families import END, IMAGE, START, VIDEO, WORDS

TURN, STOP, USER, ASSISTANT, NEW, BEGIN, FINISH, PAD, VOCAB = 70, 71, 72, 73, 74, 75, 76, 77, 80
"""Tokens of turns, and words beside speech."""
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
_EYES = {
    "depth": 1,
    "hidden_size": 8,
    "out_hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 12,
    "patch_size": 2,
    "num_position_embeddings": 9,
    "deepstack_visual_indexes": [0],
}
_EARS = {
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "d_model": 8,
    "n_window_infer": 200,
    "output_dim": 16,
    "max_source_positions": 20,
    "downsample_hidden_size": 4,
}
_EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_MEDIA_IDS = {
    "audio_token_id": hearing.AUDIO,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "audio_start_token_id": hearing.HARK,
    "vision_start_token_id": START,
    "position_id_per_seconds": 13,
}
_CODE2WAV = {
    "codebook_size": talkers.CODES,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "sliding_window": 4,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_quantizers": talkers.GROUPS,
    "upsample_rates": [3, 2],
    "upsampling_ratios": [2],
    "decoder_dim": 16,
}


def qwen3_omni(*, words: Any = None, **speech: Any) -> Any:
    """A configuration of transformers' whole Qwen3-Omni."""
    import transformers

    text = {**WORDS, **_EXPERTS, "vocab_size": VOCAB, "rope_parameters": _ROPE, **(words or {})}
    ids = {**_MEDIA_IDS, "vision_end_token_id": END, "audio_end_token_id": hearing.HUSH}
    return transformers.Qwen3OmniMoeConfig(
        thinker_config={"text_config": text, "vision_config": _EYES, "audio_config": _EARS, **ids},
        talker_config=talkers.config(**{**_MEDIA_IDS, **speech}).to_dict(),
        code2wav_config=_CODE2WAV,
        im_start_token_id=TURN,
        im_end_token_id=STOP,
        user_token_id=USER,
        assistant_token_id=ASSISTANT,
        tts_bos_token_id=BEGIN,
        tts_eos_token_id=FINISH,
        tts_pad_token_id=PAD,
    )


_OLD_IDS = {
    "audio_token_index": hearing.AUDIO,
    "image_token_index": IMAGE,
    "video_token_index": VIDEO,
    "audio_start_token_id": hearing.HARK,
    "vision_start_token_id": START,
}
_OLD_EYES = {**{name: n for name, n in _EYES.items() if name not in ("num_position_embeddings",
             "deepstack_visual_indexes")}, "window_size": 8, "fullatt_block_indexes": [0]}  # fmt: skip
_OLD_EARS = {**{name: n for name, n in _EARS.items() if name not in ("n_window_infer", "downsample_hidden_size")},
             "num_mel_bins": 4, "n_window": 10}  # fmt: skip
OLD_TALKER = {
    "vocab_size": 24,
    "embedding_size": 16,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tts_codec_pad_token_id": 13,
    "tts_codec_start_token_id": 14,
    "tts_codec_end_token_id": 15,
    "tts_codec_mask_token_id": 16,
    "tts_text_start_token_id": BEGIN,
    "tts_text_end_token_id": FINISH,
    "tts_text_pad_token_id": PAD,
}
_DIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "emb_dim": 8,
    "block_size": 4,
    "look_ahead_layers": [1],
    "look_backward_layers": [0],
    "num_embeds": 13,
    "mel_dim": 8,
    "enc_emb_dim": 6,
    "enc_dim": 8,
    "enc_channels": [8, 8, 8, 8, 24],
    "enc_attention_channels": 4,
    "enc_res2net_scale": 2,
    "enc_se_channels": 4,
}
_BIGVGAN = {
    "mel_dim": 8,
    "upsample_initial_channel": 8,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4],
}


def qwen2_5_omni() -> Any:
    """A configuration of transformers' whole Qwen2.5-Omni; of turns it says nothing, and ours are other entries."""
    import transformers

    rope = {name: x for name, x in _ROPE.items() if name != "mrope_interleaved"}
    text = {**WORDS, "vocab_size": VOCAB, "rope_parameters": rope}
    ids = {**_OLD_IDS, "vision_end_token_id": END, "audio_end_token_id": hearing.HUSH}
    return transformers.Qwen2_5OmniConfig(
        thinker_config={"text_config": text, "vision_config": _OLD_EYES, "audio_config": _OLD_EARS, **ids},
        talker_config={**OLD_TALKER, **ids, "rope_parameters": rope},
        token2wav_config={"dit_config": _DIT, "bigvgan_config": _BIGVGAN},
        im_start_token_id=TURN,
        im_end_token_id=STOP,
        user_token_id=USER,
        assistant_token_id=ASSISTANT,
    )


def conversation(
    asked: Sequence[hearing.Part],
    answer: int,
    frames: int | None,
    cfg: MediaConfig,
    *,
    seed: int,
    groups: int = talkers.GROUPS,
    voice: int = 20,
) -> dict[str, Any]:
    """A question and its answer of so many words; with frames of so many codes it is spoken, by this voice."""
    generator = torch.Generator().manual_seed(seed)
    made = hearing.document(asked, cfg, seed=seed)
    said = torch.randint(3, 60, (answer,), generator=generator).tolist()
    turns = [TURN, USER, NEW, *made["tokens"].tolist(), STOP, NEW, TURN, ASSISTANT, NEW, *said, STOP, NEW]
    tokens = torch.tensor(turns)
    labels = torch.cat([tokens[1:], torch.tensor([-100])])
    labels[: len(tokens) - answer - 3] = -100
    codes = torch.randint(0, talkers.CODES, (frames or 0, groups), generator=generator)
    speech = {"speech": codes, "speech_frames": torch.tensor([frames or 0]), "speech_voices": torch.tensor([voice])}
    return {**made, "tokens": tokens, "labels": labels, **speech}


def positions_of(model: Any, one: dict[str, Any], ids: Tensor) -> Tensor:
    """transformers' positions of a talker's tokens, `[3, 1, S]`, whose ids of the thinker these are.

    By the function of its thinker, since that of its talker reads an entry that the talker's configuration has not.
    """
    if not any(name in one for name in ("image_grid_thw", "video_grid_thw", "sound")):
        return torch.arange(len(ids)).expand(3, 1, -1)
    found: Tensor = model.thinker.get_rope_index(
        ids[None],
        one.get("image_grid_thw"),
        one.get("video_grid_thw"),
        torch.ones(1, len(ids)),
        hearing.is_scene(one),
        one.get("sound_frames"),
        one.get("video_second_per_grid"),
    )[0]
    return found


def theirs(model: Any, one: dict[str, Any]) -> dict[str, Tensor]:
    """The sums of the cross entropies of a conversation, by transformers' modules and its way to prompt the talker."""
    ids, thinker = model.config, model.config.thinker_config
    layer, tokens, codes = ids.talker_config.accept_hidden_layer, one["tokens"], one["speech"]
    run = model.thinker(**asked_of(one), output_hidden_states=True)
    entropy = torch.nn.functional.cross_entropy
    found = {"text": entropy(run.logits[0].float(), one["labels"], reduction="sum")}
    if not len(codes):
        return found
    embedded, states = run.hidden_states[0], run.hidden_states[layer]
    begin = int(((tokens[:-1] == ids.im_start_token_id) & (tokens[1:] == ids.assistant_token_id)).nonzero()[-1])
    end = begin + 3 + int((tokens[begin + 3 :] == ids.im_end_token_id).nonzero()[0])
    kinds = [thinker.image_token_id, thinker.video_token_id, thinker.audio_token_id]
    media = torch.isin(tokens, torch.tensor(kinds))[None]
    user = model._get_talker_user_parts(0, begin, media, states, embedded)
    special = model.thinker.get_input_embeddings()(
        torch.tensor([[ids.tts_bos_token_id, ids.tts_eos_token_id, ids.tts_pad_token_id]])
    )
    words = dict(zip(("bos", "eos", "pad"), model.talker.text_projection(special).chunk(3, 1), strict=True))
    mine, _, trailing = model._get_talker_assistant_parts(
        begin, end, int(one["speech_voices"][-1]), embedded, *(words[name] for name in ("pad", "bos", "eos"))
    )
    missing = max(0, len(codes) - trailing.shape[1])
    beside = torch.cat([trailing[:, : len(codes)], words["pad"].expand(1, missing, -1)], 1)
    rest, tables = codes[:, 1:], model.talker.code_predictor.get_input_embeddings()
    first = model.talker.get_input_embeddings()(codes[:, 0])
    added = torch.stack([first, *(table(rest[:, g]) for g, table in enumerate(tables))]).sum(0)
    x = torch.cat([user, mine, added + beside], 1)
    line = torch.cat([tokens[:begin], torch.full((x.shape[1] - begin,), ids.tts_pad_token_id)])
    place = positions_of(model, one, line)
    hidden = model.talker.model(inputs_embeds=x, position_ids=place, use_cache=False)[0][0]
    at = torch.arange(x.shape[1] - len(codes), x.shape[1])
    ends = torch.tensor([talkers.SPEECH["codec_eos_token_id"]])
    labels = torch.cat([codes[:, 0], ends])
    found["codes"] = entropy(model.talker.codec_head(hidden[at[0] - 1 :]).float(), labels, reduction="sum")
    found["residuals"] = talkers.residuals(model.talker, hidden[at - 1], codes)
    return found


def theirs_of_old(model: Any, one: dict[str, Any]) -> dict[str, Tensor]:
    """The same of Qwen2.5-Omni, whose way to prompt its talker is within `generate`."""
    entropy = torch.nn.functional.cross_entropy
    run = model.thinker(**asked_of(one), output_hidden_states=True)
    found = {"text": entropy(run.logits[0].float(), one["labels"], reduction="sum")}
    codes = one["speech"][:, 0]
    if not len(codes):
        return found
    x, beside, place = prompt_of_old(model, one, run)
    coded = model.talker.get_input_embeddings()
    x = torch.cat([x[:-2], x[-2:] + coded(torch.tensor([13, 14]))])
    more = beside[: len(codes)]
    more = torch.cat([more, beside[-1:].expand(len(codes) - len(more), -1)])
    place = torch.cat([place, place[..., -1:] + 1 + torch.arange(len(codes))], -1)
    given = torch.cat([x, coded(codes) + more])[None]
    scores = model.talker(inputs_embeds=given, position_ids=place, use_cache=False).logits[0]
    found["codes"] = entropy(scores[len(x) - 1 :].float(), torch.cat([codes, torch.tensor([15])]), reduction="sum")
    return found


def prompt_of_old(model: Any, one: dict[str, Any], run: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The talker's prompt `[S, W]` without codes, the rows beside frames, and places `[3, 1, S]`."""
    tokens, words = one["tokens"], model.thinker.get_input_embeddings()
    begin = 3 + int(((tokens[:-1] == TURN) & (tokens[1:] == ASSISTANT)).nonzero()[-1])
    end = begin + int((torch.cat([tokens[begin:], torch.tensor([STOP])]) == STOP).nonzero()[0])
    media = torch.isin(tokens, torch.tensor([IMAGE, VIDEO, hearing.AUDIO]))
    embedded, states = run.hidden_states[0][0], run.hidden_states[-1][0]
    before = (states + embedded.masked_fill(media[:, None], 0))[:begin]
    reply = (states + embedded)[begin:end]
    special = words(torch.tensor([BEGIN, FINISH, PAD]))
    x, beside = torch.cat([before, special[:1], reply[:1]]), torch.cat([reply[1:], special[1:]])
    ids = torch.cat([tokens[:begin], torch.tensor([BEGIN]), tokens[begin : begin + 1]])
    return x, beside, positions_of(model, one, ids)


def asked_of(one: dict[str, Any]) -> dict[str, Any]:
    """What transformers' thinker is given of a conversation."""
    return hearing.asked(one, use_cache=False, use_audio_in_video=hearing.is_scene(one))


@torch.no_grad()
def spoken_by_old(model: Any, one: dict[str, Any], *, frames: int) -> list[int]:
    """What Qwen2.5-Omni's talker says greedily, without the code that begins speech and with its penalty for codes that
    were said, from the whole sequence again for each code.

    Not by its `generate`: that of transformers 5.24 makes a mask of the prompt, and its `forward` then gives no places
    to what comes with media, and no code to the last two tokens.
    """
    import transformers

    x, beside, place = prompt_of_old(model, one, model.thinker(**asked_of(one), output_hidden_states=True))
    coded, said = model.talker.get_input_embeddings(), [16, 13, 14]
    x = torch.cat([x[:-2], x[-2:] + coded(torch.tensor([13, 14]))])
    less = transformers.RepetitionPenaltyLogitsProcessor(1.05)
    for step in range(frames):
        scores = model.talker(inputs_embeds=x[None], position_ids=place, use_cache=False).logits[:, -1]
        scores = less(torch.tensor([said]), scores)
        scores[:, 14] = -torch.inf
        code = int(scores.argmax())
        if code in (13, 15):
            break
        said.append(code)
        x = torch.cat([x, coded(torch.tensor([code])) + beside[min(step, len(beside) - 1)]])
        place = torch.cat([place, place[..., -1:] + 1], -1)
    return said[3:]
