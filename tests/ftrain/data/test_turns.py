"""Masks of the chat templates of many families, which TRL ships, beside TRL's own masks for them."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from ftrain.data.chat_template import as_fields
from ftrain.data.encoding import ChatEncoder
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Chat, Message, Place, say

PLACE = Place("chat.jsonl", 1)
CONTROL = re.compile(
    r"<\|[\w/ ]+\|?>|<[\w/]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_\w+>|<end_of_utterance>|\[/?gMASK\]|<sop>|</?s>|<[be]os>"
)
ANSWERS = ("Hello!  It is\n\nfine.", "No more.")
CHAT = Chat((say("user", "Hi there"), say("assistant", ANSWERS[0]), say("user", "And?"), say("assistant", ANSWERS[1])),
            place=PLACE)  # fmt: skip
THOUGHTS = Chat(
    (say("user", "Hi"), say("assistant", "<think>\nhm\n</think>\n\nYes."), say("user", "So?"),
     say("assistant", "<think>\nah\n</think>\n\nNo.")), place=PLACE,
)  # fmt: skip


def templates(training):
    try:
        import trl
    except ImportError:
        return []
    folder = Path(trl.__path__[0]) / "chat_templates"
    return sorted(p for p in folder.glob("*.jinja") if p.stem.endswith("_training") == training)


def tokenizer_for(tokenizer, template):
    """With the control tokens of a template, each one token."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": sorted(set(CONTROL.findall(template)))})
    return made


def runs(ids, trained, tokenizer):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
    return [tokenizer.decode(ids[start:end]) for start, end in edges.reshape(-1, 2)]


def test_templates_of_trl_are_there():
    pytest.importorskip("trl")
    assert len(templates(True)) > 20
    assert len(templates(False)) > 20


@pytest.mark.parametrize("path", templates(False), ids=lambda path: path.stem)
def test_every_family_ends_with_the_words_and_a_control_token(tokenizer, path):
    template = path.read_text()
    with_control = tokenizer_for(tokenizer, template)
    encoded = ChatEncoder(with_control, template=template).encode(CHAT)
    found = runs(encoded.ids, encoded.trained, with_control)
    assert len(found) == 2
    for run, words in zip(found, ANSWERS, strict=True):
        before, said, after = run.partition(words)
        assert said
        assert set(CONTROL.sub("", after)) <= {" "}
        assert CONTROL.search(after)
        assert "Hi there" not in before
        assert "And?" not in before


@pytest.mark.parametrize("path", templates(False), ids=lambda path: path.stem)
def test_thoughts_go_along_or_are_dropped_as_the_template_does(tokenizer, path):
    template = path.read_text()
    with_control = tokenizer_for(tokenizer, template)
    encoded = ChatEncoder(with_control, template=template).encode(THOUGHTS)
    found = runs(encoded.ids, encoded.trained, with_control)
    assert [run.count(words) for run, words in zip(found, ("Yes.", "No."), strict=True)] == [1, 1]
    assert all("So?" not in run for run in found)


@pytest.mark.parametrize("path", templates(True), ids=lambda path: path.stem)
@pytest.mark.parametrize("sample", [CHAT, THOUGHTS], ids=["plain", "thoughts"])
def test_masks_are_those_of_trl_but_for_what_follows_the_end_of_a_turn(tokenizer, path, sample):
    template = path.read_text()
    with_control = tokenizer_for(tokenizer, template)
    encoder = ChatEncoder(with_control, template=template)
    encoded = encoder.encode(sample)
    theirs = with_control.apply_chat_template(
        as_fields(sample.messages, parts=encoder.turns.parts),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert encoded.ids.tolist() == theirs["input_ids"]
    mask = np.array(theirs["assistant_masks"], bool)
    assert not (encoded.trained & ~mask).any()
    assert {with_control.decode([token]).strip() for token in encoded.ids[mask & ~encoded.trained]} <= {
        "", "<|im_end|>",
    }  # fmt: skip # phi3 writes eos_token after the end of the last turn


QWEN3 = "qwen3.jinja"


def qwen3(tokenizer):
    path = next((p for p in templates(False) if p.name == QWEN3), None)
    if path is None:
        pytest.skip("TRL, which has Qwen3's chat template, is not installed")
    template = path.read_text()
    return tokenizer_for(tokenizer, template), template


def test_qwen3_writes_thoughts_in_the_last_turn_only(tokenizer):
    with_control, template = qwen3(tokenizer)
    encoded = ChatEncoder(with_control, template=template).encode(THOUGHTS)
    assert runs(encoded.ids, encoded.trained, with_control) == [
        "Yes.<|im_end|>", "<think>\nah\n</think>\n\nNo.<|im_end|>",
    ]  # fmt: skip


def test_tool_calls_are_learned_and_answers_of_tools_are_not(tokenizer):
    with_control, template = qwen3(tokenizer)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    messages = (
        say("user", "2 + 2?"), Message("assistant", (), None, {"tool_calls": [call]}), say("tool", "four"),
        say("assistant", "It is 4."),
    )  # fmt: skip
    tools = ({"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}},)
    encoded = ChatEncoder(with_control, template=template).encode(Chat(messages, tools, place=PLACE))
    first, last = runs(encoded.ids, encoded.trained, with_control)
    assert first.endswith('<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>')
    assert last.endswith("It is 4.<|im_end|>")
    assert "four" not in first + last


def test_a_template_without_a_prompt_to_speak_learns_no_header(tokenizer):
    template = tokenizer.chat_template.partition("{% if add_generation_prompt")[0]
    encoded = ChatEncoder(tokenizer, template=template).encode(CHAT)
    assert runs(encoded.ids, encoded.trained, tokenizer) == [words + "<|im_end|>" for words in ANSWERS]


def test_a_template_that_leaves_the_last_turn_open_is_closed(tokenizer):
    template = (
        "{% for m in messages %}{{ ('' if loop.first else '<|im_end|>') + m['role'] + ': ' + m['content'] }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|>assistant: {% endif %}"
    )
    encoded = ChatEncoder(tokenizer, template=template).encode(CHAT)
    assert runs(encoded.ids, encoded.trained, tokenizer) == [words + "<|im_end|>" for words in ANSWERS]


def test_words_that_the_template_changes_are_a_named_reject(tokenizer):
    template = tokenizer.chat_template.replace("message['content']", "(message['content'] | replace('fine', 'bad'))")
    with pytest.raises(BadRow, match=r"hides where message 2 \('Hello!") as error:
        ChatEncoder(tokenizer, template=template).encode(CHAT)
    assert error.value.kind == "turn not found"


def test_a_turn_that_the_template_does_not_end_is_a_named_reject(tokenizer):
    """The model would not learn to stop there."""
    template = tokenizer.chat_template.replace("'<|im_end|>'", "('' if 'fine' in message['content'] else '<|im_end|>')")
    with pytest.raises(BadRow, match="hides where message 2"):
        ChatEncoder(tokenizer, template=template).encode(CHAT)


def test_a_token_that_begins_turns_ends_none(tokenizer):
    """Without an end of its own the next thing after the words is the beginning of the next turn."""
    template = tokenizer.chat_template.replace("<|im_end|>", "")
    with pytest.raises(ValueError, match=r"writes no control token but .* the model does not learn to stop"):
        ChatEncoder(tokenizer, template=template).encode(CHAT)
