import json

import pytest

from ftrain.data import sample as samples
from ftrain.data.formats.known import FORMATS, by_name, detect
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Message, Part, Place, say

PLACE = Place("a.jsonl", 3)
USER, GOOD, BAD = say("user", "hi"), say("assistant", "yes"), say("assistant", "no")
ASKED = say("user", "hi", train=False)
CHAT = samples.Chat((USER, GOOD), place=PLACE)
CHOICE = samples.Preference((ASKED,), (GOOD,), (BAD,), place=PLACE)
OPENAI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
NO = [{"role": "assistant", "content": "no"}]
PICTURE = Part("image", source="a.png")

ROWS = [
    ("text", {"text": "hi"}, samples.Prose("hi", place=PLACE)),
    ("openai", {"messages": OPENAI}, CHAT),
    ("openai", {"messages": json.dumps(OPENAI)}, CHAT),
    ("openai-conversations", {"conversations": OPENAI}, CHAT),
    ("sharegpt", {"conversations": SHAREGPT}, CHAT),
    ("sharegpt", {"conversations": SHAREGPT, "system": "s"},
     samples.Chat((say("system", "s"), USER, GOOD), place=PLACE)),
    ("llava", {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nhi"}, SHAREGPT[1]]},
     samples.Chat((Message("user", (PICTURE, Part("text", "\nhi"))), GOOD), place=PLACE)),
    ("swift-messages", {"messages": OPENAI, "images": ["a.png"]},
     samples.Chat((Message("user", (PICTURE, Part("text", "hi"))), GOOD), place=PLACE)),
    ("swift", {"query": "hi", "response": "yes", "history": [["a", "b"]], "system": "s"},
     samples.Chat((say("system", "s"), say("user", "a"), say("assistant", "b"), USER, GOOD), place=PLACE)),
    ("alpaca", {"instruction": "hi", "input": "", "output": "yes"}, CHAT),
    ("alpaca", {"instruction": "a", "input": "b", "output": "yes", "system": None},
     samples.Chat((say("user", "a\nb"), GOOD), place=PLACE)),
    ("prompt-completion", {"prompt": "hi", "completion": "yes"}, samples.Chat((ASKED, GOOD), place=PLACE)),
    ("preference", {"prompt": "hi", "chosen": "yes", "rejected": "no"}, CHOICE),
    ("preference", {"prompt": OPENAI[:1], "chosen": OPENAI[1:], "rejected": NO}, CHOICE),
    ("preference", {"prompt": "hi", "chosen": OPENAI, "rejected": [OPENAI[0], *NO]}, CHOICE),
    ("preference-implicit", {"chosen": OPENAI, "rejected": [OPENAI[0], *NO]}, CHOICE),
    ("preference-implicit", {"chosen": OPENAI, "rejected": [*OPENAI, OPENAI[0], *NO]},
     samples.Preference((ASKED,), (GOOD,), (GOOD, USER, BAD), place=PLACE)),
    ("preference-implicit", {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
     CHOICE),
    ("preference-alpaca", {"instruction": "hi", "chosen": "yes", "rejected": "no"}, CHOICE),
    ("preference-sharegpt", {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1],
                             "rejected": {"from": "gpt", "value": "no"}}, CHOICE),
    ("preference-swift", {"messages": OPENAI, "rejected_response": "no"}, CHOICE),
    ("preference-swift", {"query": "hi", "response": "yes", "rejected_response": "no"}, CHOICE),
    ("kto", {"prompt": "hi", "completion": "yes", "label": True},
     samples.Judged((ASKED,), (GOOD,), True, place=PLACE)),
    ("kto-chat", {"messages": OPENAI, "label": False}, samples.Judged((ASKED,), (GOOD,), False, place=PLACE)),
    ("kto-chat", {"conversations": SHAREGPT, "kto_tag": True}, samples.Judged((ASKED,), (GOOD,), True, place=PLACE)),
    ("captioned", {"image": {"bytes": b"x", "path": None}, "text": "cat"},
     samples.Captioned(Part("image", source=b"x"), "cat", place=PLACE)),
    ("captioned", {"__key__": "1", "jpg": b"x", "txt": "cat"},
     samples.Captioned(Part("image", source=b"x"), "cat", place=PLACE)),
    ("captioned", {"audio": "a.wav", "transcription": "hello"},
     samples.Captioned(Part("audio", source="a.wav"), "hello", place=PLACE)),
    ("pairs", {"query": "q", "positive": "p", "negatives": ["m", "n"]},
     samples.Pair("q", "p", ("m", "n"), place=PLACE)),
    ("pairs", {"anchor": "q", "positive": "p"}, samples.Pair("q", "p", place=PLACE)),
    ("classes", {"text": "hi", "label": "2"}, samples.Classed("hi", 2, place=PLACE)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "wanted"), ROWS, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(ROWS)])
def test_rows_are_told_by_their_fields_and_say_what_they_say(name, row, wanted):
    found = detect([row])
    assert found.name == name
    assert found.read(row, PLACE) == wanted
    assert found.makes is type(wanted)


def pictures_asked(sample):
    """Sources of the pictures that stand in what is asked."""
    chat = isinstance(sample, samples.Chat)
    asked = sample.messages[:-1] if chat else sample.prompt
    return [part.source for message in asked for part in message.media]


WORDS = [(name, row, made) for name, row, made in ROWS if "image" not in row and "images" not in row]


@pytest.mark.parametrize(("name", "row", "made"), WORDS, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(WORDS)])
def test_files_beside_the_texts_are_seen_or_refused_by_every_format(name, row, made):
    row = {**row, "images": ["a.png"]}
    if isinstance(made, samples.Chat | samples.Preference | samples.Judged):
        assert pictures_asked(by_name(name).read(row, PLACE)) == ["a.png"]
        return
    with pytest.raises(BadRow, match="1 x image") as error:
        by_name(name).read(row, PLACE)
    assert error.value.kind == "marks and media differ"


def test_parts_without_a_source_stand_for_the_files_of_a_row():
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]}
    row = {"prompt": [asked], "chosen": OPENAI[1:], "rejected": NO, "images": ["a", b"b"]}
    assert pictures_asked(detect([row]).read(row, PLACE)) == ["a", b"b"]
    named = [{"role": "user", "content": [{"type": "image", "image": "a"}]}, *OPENAI[1:]]
    assert pictures_asked(by_name("openai").read({"messages": named, "images": ["a"]}, PLACE)) == ["a"]


def test_token_ids_keep_their_labels():
    found = detect([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]}])
    tokens = found.read({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, PLACE)
    assert (found.name, tokens.ids.tolist(), tokens.labels.tolist()) == ("tokens", [1, 2, 3], [-100, 2, 3])


def test_every_format_has_a_row_here_and_is_found_by_name():
    assert {name for name, *_ in ROWS} | {"tokens"} == {format.name for format in FORMATS}
    assert all(by_name(format.name) is format for format in FORMATS)
    with pytest.raises(ValueError, match="did you mean 'sharegpt'"):
        by_name("sharegtp")


def test_a_chat_with_tools_pictures_and_flags():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    row = {
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "what?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
                {"type": "video", "video": "a.mp4"},
                {"type": "video", "video": "a.mp4", "audio": True},
            ]},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
            {"role": "assistant", "content": "four", "reasoning_content": "hm", "name": None},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }  # fmt: skip
    chat = detect([row]).read(row, PLACE)
    assert [part.kind for part in chat.messages[0].parts] == ["text", "image", "audio", "video", "video"]
    assert [part.sound for part in chat.messages[0].parts[3:]] == [False, True]
    assert [part.source for part in chat.messages[0].media] == [
        "data:image/png;base64,AA==", "data:audio;base64,AAAA", "a.mp4", "a.mp4",
    ]  # fmt: skip
    assert chat.messages[1].extra["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert [m.train for m in chat.messages] == [None, False, None, None]
    assert chat.messages[3].extra == {"reasoning_content": "hm"}
    assert chat.tools[0]["function"]["name"] == "add"


def test_calls_and_observations_of_sharegpt():
    turns = [
        {"from": "human", "value": "hi"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "two"},
    ]  # fmt: skip
    chat = by_name("sharegpt").read({"conversations": turns}, PLACE)
    assert [m.role for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


BROKEN = [
    ("text", {"text": None}, "null field"),
    ("text", {"text": "  "}, "empty text"),
    ("text", {"text": 3}, "wrong type"),
    ("openai", {"messages": None}, "null field"),
    ("openai", {"messages": []}, "no messages"),
    ("openai", {"messages": "[{"}, "invalid JSON"),
    ("openai", {"messages": [{"role": "user", "content": None}]}, "null field"),
    ("openai", {"messages": [{"role": None, "content": "x"}]}, "null field"),
    ("openai", {"messages": [None]}, "wrong type"),
    ("openai", {"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "unknown part"),
    ("openai", {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "audio": "a.wav"}]}]},
     "wrong type"),
    ("openai", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "media missing"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "unknown role"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": None}]}, "null field"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "no json"}]}, "invalid JSON"),
    ("llava", {"image": "a.png", "conversations": [{"from": "human", "value": "<image><image>"}]},
     "marks and media differ"),
    ("swift-messages", {"messages": [{"role": "user", "content": "<image>"}], "images": ["a", "b"]},
     "marks and media differ"),
    ("swift-messages", {"messages": [{"role": "user", "content": "<image>"}], "images": [None]}, "media missing"),
    ("swift-messages", {"messages": [{"role": "user", "content": "<image>"}], "images": None},
     "marks and media differ"),
    ("llava", {"conversations": [{"from": "human", "value": "<image>hi"}]}, "marks and media differ"),
    ("openai", {"messages": [{"role": "user", "content": [{"type": "image"}] * 2}], "images": ["a"]},
     "marks and media differ"),
    ("openai", {"messages": [{"role": "user", "content": [{"type": "image", "image": "a"}]}], "images": ["b"]},
     "marks and media differ"),
    ("preference", {"prompt": "x", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": "y",
                    "images": ["a"]}, "media missing"),
    ("tokens", {"input_ids": [1], "images": ["a"]}, "marks and media differ"),
    ("alpaca", {"instruction": "x", "output": ""}, "empty text"),
    ("preference", {"prompt": "x", "chosen": "y", "rejected": "y"}, "nothing to choose"),
    ("preference", {"prompt": "x", "chosen": None, "rejected": "y"}, "null field"),
    ("preference-implicit", {"chosen": "a", "rejected": "b"}, "no prompt"),
    ("preference-implicit", {"chosen": OPENAI[1:], "rejected": NO}, "no prompt"),
    ("kto", {"prompt": "x", "completion": "y", "label": "maybe"}, "wrong type"),
    ("kto-chat", {"messages": OPENAI[:1], "label": True}, "no answer"),
    ("tokens", {"input_ids": []}, "empty text"),
    ("tokens", {"input_ids": [1.5]}, "wrong type"),
    ("tokens", {"input_ids": [-1]}, "wrong type"),
    ("tokens", {"input_ids": [1, 2], "labels": [1]}, "wrong length"),
    ("captioned", {"image": None, "text": "x"}, "media missing"),
    ("captioned", {"image": "a.png", "text": None}, "null field"),
    ("pairs", {"query": "x", "positive": []}, "null field"),
    ("classes", {"text": "x", "label": 1.5}, "wrong type"),
    ("classes", {"text": "x", "label": None}, "null field"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "kind"), BROKEN, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(BROKEN)])
def test_a_broken_row_is_named_with_its_place(name, row, kind):
    with pytest.raises(BadRow, match=r"^a\.jsonl, row 3: ") as error:
        by_name(name).read(row, PLACE)
    assert error.value.kind == kind


def test_the_format_is_that_of_most_rows_and_null_fields_do_not_hide_it():
    rows = [{"messages": None}, {"messages": OPENAI}, {"other": 1}]
    assert detect(rows).name == "openai"


def test_wanted_kinds_choose_among_formats():
    row = {"text": "hi", "label": 1}
    assert detect([row]).name == "classes"
    assert detect([row], kinds=(samples.Prose,)).name == "text"
    with pytest.raises(ValueError, match=r'rows of the format classes \("text", "label"\), which this task cannot use'):
        detect([row], kinds=(samples.Preference,))


def test_an_unknown_format_shows_the_first_row_and_the_known_ones():
    with pytest.raises(ValueError) as error:
        detect([{"foo": "x" * 900, "blob": b"123"}], where="data.jsonl")
    said = str(error.value)
    assert said.startswith('data.jsonl has rows of an unknown format, first of all {"foo": "xxx')
    assert len(said) < 3000
    for format in FORMATS:
        assert f"{format.name}: {format.keys}" in said
    with pytest.raises(ValueError, match="no rows that can be read"):
        detect([])
