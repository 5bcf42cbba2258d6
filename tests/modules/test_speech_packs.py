"""Lines of speech: what a talker reads of a conversation, by hand; packs of several; and speech that does not fit."""

import pytest
import torch

from ftrain.modules.speech_lines import ChatIds, CodeIds, qwen2_5_line, qwen3_line
from ftrain.modules.speech_packs import SpeechConfig, prepare

BEGIN, END, PAD, TURN, STOP, USER, ASSISTANT, NEW, MEDIA = 80, 81, 82, 70, 71, 72, 73, 74, 75
CHAT = ChatIds(BEGIN, END, PAD, turn=TURN, end_of_turn=STOP, user=USER, assistant=ASSISTANT)
THREE = SpeechConfig(qwen3_line, CHAT, CodeIds(14, 15, 13, silent=(16, 17, 18)), groups=2, sounds=12, voices=24)
TWO = SpeechConfig(qwen2_5_line, CHAT, CodeIds(14, 15, 13), groups=1, sounds=12, voices=80)
ASKED = [TURN, USER, NEW, 1, MEDIA, MEDIA, 2, STOP, NEW]
ANSWER = [TURN, ASSISTANT, NEW, 5, 6, STOP, NEW]
PLACES = [0, 1, 2, 3, 4, 4, 5, 6, 7]
"""Of the question, in which two tokens of media stand at one time."""


def seen(tokens, places=None):
    place = torch.arange(len(tokens)) if places is None else torch.tensor(places)
    return {"positions": place[:, None].expand(-1, 3).contiguous(), "replaced": tokens == MEDIA}


def raw(tokens, frames, voices, codes, **more):
    numbers = {"speech_frames": torch.tensor(frames, dtype=torch.int64), "speech_voices": torch.tensor(voices)}
    codes_FG = torch.as_tensor(codes).reshape(sum(frames), -1) if frames else codes
    return {"tokens": torch.tensor(tokens), "speech": codes_FG, **numbers, **more}


def test_qwen3_hears_the_users_turns_and_speaks_beside_the_words():
    batch = raw([*ASKED, *ANSWER], [3], [20], [[1, 2], [3, 4], [5, 6]])
    found = prepare(batch, seen(batch["tokens"], [*PLACES, *range(8, 15)]), THREE, tokens=22)
    prefix = [TURN, ASSISTANT, NEW, PAD, PAD, PAD, PAD, BEGIN, 5]
    words = [TURN, USER, NEW, 1, -1, -1, 2, STOP, NEW, *prefix, 6, END, PAD]
    assert found["words"].tolist() == [*words, PAD]
    assert found["codes"].tolist() == [-1] * 12 + [16, 17, 18, 20, 13, 14, 1, 3, 5, -1]
    assert found["labels"].tolist() == [-100] * 17 + [1, 3, 5, 15, -100]
    assert found["positions"][:, 1].tolist() == [*PLACES, *range(8, 20), 0]
    assert found["segments"].ids_T.tolist() == [0] * 21 + [1]
    assert found["frames"]["codes"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert found["frames"]["index"].tolist() == [18, 19, 20]
    assert (found["states"]["source"].tolist(), found["states"]["index"].tolist()) == ([4, 5], [4, 5])


def test_a_turn_before_is_left_out_and_places_close_up():
    tokens = [TURN, 77, NEW, STOP, *ASKED, *ANSWER, TURN, USER, NEW, 3, STOP, *ANSWER]
    batch = raw(tokens, [0, 1], [0, 20], [[1, 2]])
    places = [0, 1, 2, 3, *(4 + n for n in PLACES), *range(12, 31)]
    found = prepare(batch, seen(batch["tokens"], places[: len(tokens)]), THREE)
    assert found["words"][:14].tolist() == [TURN, USER, NEW, 1, -1, -1, 2, STOP, NEW, TURN, USER, NEW, 3, STOP]
    assert found["positions"][:15, 0].tolist() == [*PLACES, *range(8, 14)]
    assert found["states"]["source"].tolist() == [8, 9]
    assert found["labels"][22:25].tolist() == [1, 15, -100]


def test_qwen2_5_hears_all_and_adds_states_to_words():
    batch = raw([*ASKED, *ANSWER], [3], [79], [1, 3, 5])
    found = prepare(batch, seen(batch["tokens"], [*PLACES, *range(8, 15)]), TWO, tokens=17)
    words = [TURN, USER, NEW, 1, -1, -1, 2, STOP, NEW, TURN, ASSISTANT, NEW, 79, 5, 6, END, PAD]
    assert found["words"].tolist() == words
    assert found["codes"].tolist() == [-1] * 12 + [13, 14, 1, 3, 5]
    assert found["labels"].tolist() == [-100] * 13 + [1, 3, 5, 15]
    assert found["positions"][:, 2].tolist() == [*PLACES, *range(8, 16)]
    assert found["states"]["source"].tolist() == [*range(12), 12, 13]
    assert found["states"]["index"].tolist() == [*range(12), 13, 14]


def test_packs_have_their_own_lines_and_room():
    """Two packs of two conversations: one spoken in the first, both in the second."""
    tokens = [*ASKED, *ANSWER] * 4
    segments = torch.arange(4).repeat_interleave(16)
    batch = raw(tokens, [2, 0, 1, 2], [20, 0, 21, 20], [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]], segments=segments)
    found = prepare(batch, seen(batch["tokens"]), THREE, packs=2, parts=2, tokens=40)
    assert found["frames"]["index"].tolist() == [18, 19, 80, 80, 58, 77, 78, 80]
    assert found["states"]["source"].tolist() == [4, 5, 64, 64, 36, 37, 52, 53]
    assert found["codes"][[15, 55, 74]].tolist() == [20, 21, 20]
    assert found["segments"].ids_T.unique_consecutive().tolist() == [0, 1, 2, 3, 4]


def test_a_document_without_a_turn_has_nothing_to_speak():
    batch = raw([*ASKED, *ANSWER, 0, 0], [1], [20], [[1, 2]], segments=torch.tensor([0] * 16 + [1] * 2))
    found = prepare(batch, seen(batch["tokens"]), THREE, tokens=20)
    assert found["labels"][17:].tolist() == [1, 15, -100]
    batch = raw([0, 0], [], [], torch.zeros(0, 2, dtype=torch.int64))
    found = prepare(batch, seen(batch["tokens"]), THREE, frames=2)
    assert found["words"].tolist() == [PAD, PAD]
    assert found["frames"]["index"].tolist() == [2, 2]


def wrong(**changes):
    return {**raw([*ASKED, *ANSWER], [1], [20], [[1, 2]]), **changes}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (wrong(speech_frames=torch.tensor([1, 1])), "has 1 turns of an assistant, speech_frames .2."),
        (wrong(speech_voices=torch.tensor([-1])), "speech_voices of turn 0 is -1: ids of voices are 0 to 23"),
        (wrong(speech_voices=torch.tensor([24])), "speech_voices of turn 0 is 24: ids"),
        (wrong(speech_voices=torch.tensor([2.0])), r"speech_voices is torch.float32: give integers"),
        (wrong(speech_frames=torch.tensor([2])), "are not the turns of 1 frames"),
        (wrong(speech=torch.tensor([[1.0, 2.0]])), "speech is torch.float32 .1, 2.: give integers .frames, 2."),
        (wrong(speech=torch.tensor([[1]])), "give integers .frames, 2."),
        (wrong(speech=torch.tensor([[1, 12]])), "frame 0 of 'speech' is .1, 12.: codes are 0 to 11"),
        (raw([*ASKED, TURN, ASSISTANT, NEW, STOP], [1], [20], [[1, 2]]), "token 9 says nothing and has speech of 1"),
        (raw([*ANSWER], [1], [20], [[1, 2]]), "pack 0 needs 10 tokens of the talker, for which 7 have no room"),
        ({"tokens": torch.tensor(ANSWER), "speech": torch.ones(1, 2)}, "and no 'speech_frames'"),
    ],
)
def test_speech_that_does_not_fit_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        prepare(batch, seen(batch["tokens"]), THREE, tokens=None if len(batch["tokens"]) < 9 else 40)


def test_rows_for_which_there_is_no_room_are_refused():
    batch = wrong()
    with pytest.raises(ValueError, match="has 2 states, for which states=1"):
        prepare(batch, seen(batch["tokens"]), THREE, tokens=40, states=1)
    with pytest.raises(ValueError, match="frames=3 in 2 equal parts"):
        prepare(batch, seen(batch["tokens"]), THREE, tokens=40, frames=3, parts=2)
