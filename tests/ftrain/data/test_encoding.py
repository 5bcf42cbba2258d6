import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from ftrain.data.documents import IGNORE
from ftrain.data.encoding import ChatEncoder, Length
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Chat, Place, Prose, Tokens, say

PLACE = Place("chat.jsonl", 7)
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def chat(*texts, train=None, system=None):
    turns = [say(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return Chat(tuple([say("system", system)] * (system is not None) + turns), place=PLACE)


def learned(encoded, tokenizer):
    """The texts of what is trained on, one for each run of tokens."""
    runs, run = [], []
    for token, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if trained:
            run.append(token)
        elif run:
            runs, run = [*runs, run], []
    return [tokenizer.decode(run) for run in [*runs, *([run] if run else [])]]


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(
    lambda text: "<|" not in text
)


@settings(deadline=None)
@given(st.lists(words, min_size=2, max_size=7), st.none() | words)
@example(["hi", "\n\nhello"], None)
@example(["hi", "🤖"], None)
@example(["hi", " "], None)
@example(["hi", "\n"], "s")
def test_what_is_trained_on_spells_the_words_of_the_assistant_and_its_end(tokenizer, texts, system):
    encoded = ChatEncoder(tokenizer).encode(chat(*texts, system=system))
    assert learned(encoded, tokenizer) == [text + "<|im_end|>" for text in texts[1::2]]
    rendered = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns(texts, system))
    assert tokenizer.decode(encoded.ids) == rendered


def turns(texts, system):
    speakers = [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return [("system", system)] * (system is not None) + speakers


@settings(deadline=None, max_examples=30)
@given(st.lists(words, min_size=1, max_size=3), words)
def test_ids_before_the_words_are_those_of_the_prompt(tokenizer, texts, answer):
    """What the model learns to continue is what it will be given."""
    before = chat(*(texts[:1] if len(texts) % 2 == 0 else texts))
    encoded = ChatEncoder(tokenizer).encode(Chat((*before.messages, say("assistant", answer)), place=PLACE))
    prompt = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.text} for m in before.messages], add_generation_prompt=True, return_dict=False
    )
    last = np.flatnonzero(np.diff(encoded.trained.astype(int)) == 1)[-1] + 1
    assert encoded.ids[:last].tolist() == prompt


def test_a_token_across_the_edge_of_the_words_is_cut_there(tokenizer):
    """ " hello" is one token, but the model is given a prompt that ends with a space, and has to say "hello"."""
    template = PLAIN.replace("'\n'", "'<|im_end|>'") + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    encoded = ChatEncoder(tokenizer, template=template).encode(chat("hi", "hello"))
    prompt = tokenizer("user: hi<|im_end|>assistant: ", add_special_tokens=False)["input_ids"]
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert learned(encoded, tokenizer) == ["hello<|im_end|>"]
    at_once = tokenizer("user: hi<|im_end|>assistant: hello<|im_end|>", add_special_tokens=False)["input_ids"]
    assert at_once != encoded.ids.tolist()


@pytest.mark.parametrize(
    ("train", "wanted"), [("assistant", ["a<|im_end|>", "b<|im_end|>"]), ("last", ["b<|im_end|>"])]
)
def test_all_turns_or_the_last_one(tokenizer, train, wanted):
    encoded = ChatEncoder(tokenizer, train=train).encode(chat("1", "a", "2", "b", "3"))
    assert learned(encoded, tokenizer) == wanted


def test_everything(tokenizer):
    encoded = ChatEncoder(tokenizer, train="everything").encode(chat("1"))
    assert encoded.trained.all()


def test_messages_say_themselves_whether_they_are_trained_on(tokenizer):
    messages = (say("user", "1", train=True), say("assistant", "a", train=False), say("assistant", "b"))
    encoded = ChatEncoder(tokenizer).encode(Chat(messages, place=PLACE))
    assert learned(encoded, tokenizer) == ["1<|im_end|>", "b<|im_end|>"]


def test_labels_are_shifted_and_the_last_token_has_none(tokenizer):
    document = ChatEncoder(tokenizer).encode(chat("hi", "hello")).document()
    at = np.flatnonzero(document.labels != IGNORE)
    assert (document.labels[at] == document.tokens[at + 1]).all()
    assert document.labels[-1] == IGNORE
    assert tokenizer.decode(document.labels[at]) == "hello<|im_end|>"


def test_prose_ends_and_is_all_trained_on(tokenizer):
    encoded = ChatEncoder(tokenizer).encode(Prose("hello there", place=PLACE))
    assert tokenizer.decode(encoded.ids) == "hello there<|im_end|>"
    assert encoded.trained.all()


def test_tokens_keep_their_labels(tokenizer):
    encoder = ChatEncoder(tokenizer)
    assert encoder.encode(Tokens([5, 6, 7], [-100, 6, 7], place=PLACE)).trained.tolist() == [False, True, True]
    assert encoder.encode(Tokens([5, 6, 7], place=PLACE)).trained.all()
    with pytest.raises(BadRow, match="label 6 at place 0, where the id is 5: labels must not be shifted"):
        encoder.encode(Tokens([5, 6, 7], [6, 7, -100], place=PLACE))


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        (chat("only me"), "nothing to train on"),
        (chat("hi", "a <|im_end|> b"), "control token in a text"),
        (chat("hi <|im_start|>assistant", "b"), "control token in a text"),
        (Prose("a<|endoftext|>b", place=PLACE), "control token in a text"),
        (Tokens([1, 2], [-100, -100], place=PLACE), "nothing to train on"),
        (Chat((), place=PLACE), "no messages"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(tokenizer, sample, kind):
    with pytest.raises(BadRow, match=r"chat\.jsonl, row 7: ") as error:
        ChatEncoder(tokenizer).encode(sample)
    assert error.value.kind == kind


def test_long_rows_are_refused_or_cut_as_asked(tokenizer):
    sample = chat("first question", "first answer", "q", "the last answer of all")
    whole = ChatEncoder(tokenizer).encode(sample)
    with pytest.raises(BadRow, match=rf"{len(whole.ids)} tokens, and at most 20 are taken"):
        ChatEncoder(tokenizer, length=Length(20)).encode(sample)
    some = len(whole.ids) - 20
    left = ChatEncoder(tokenizer, length=Length(some, "left")).encode(sample)
    right = ChatEncoder(tokenizer, length=Length(some, "right")).encode(sample)
    assert left.ids.tolist() == whole.ids[20:].tolist()
    assert right.ids.tolist() == whole.ids[:-20].tolist()
    with pytest.raises(BadRow, match="none of its 4 tokens is trained on after it was cut") as error:
        ChatEncoder(tokenizer, length=Length(4, "right")).encode(sample)
    assert error.value.kind == "nothing to train on"
    assert ChatEncoder(tokenizer, length=Length(len(whole.ids))).encode(sample).ids.tolist() == whole.ids.tolist()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda t: ChatEncoder(t, train="some"), "train='some'"),
        (lambda t: Length(0), "at least 1"),
        (lambda t: Length(5, "middle"), "truncate='middle'"),
        (
            lambda t: ChatEncoder(t, template=PLAIN).encode(chat("a", "b")),
            "does not learn to stop",
        ),
        (lambda t: ChatEncoder(t, template="{{ oops( }}").encode(chat("a", "b")), "the chat template refuses it"),
        (
            lambda t: ChatEncoder(t, template=t.chat_template.replace("['content']", "['content'] | upper")).encode(
                chat("a", "b")
            ),
            "does not write what the assistant says",
        ),
    ],
)
def test_wrong_options_and_templates_are_errors(tokenizer, make, said):
    with pytest.raises(ValueError, match=said) as error:
        make(tokenizer)
    assert not isinstance(error.value, BadRow)


def test_a_chat_that_the_template_refuses_is_a_reject(tokenizer):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    encoder = ChatEncoder(tokenizer, template=template + tokenizer.chat_template)
    with pytest.raises(BadRow, match="no system here"):
        encoder.encode(chat("a", "b", system="s"))


@pytest.mark.slow
def test_smollm2_learns_its_words_and_no_prompt(smol):
    encoded = ChatEncoder(smol).encode(chat("What is 2 + 2?", "It is 4.", "And 3 + 3?", "6 🤖\n"))
    assert learned(encoded, smol) == ["It is 4.<|im_end|>", "6 🤖\n<|im_end|>"]
    prompt = smol.apply_chat_template([{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True,
                                      return_dict=False)  # fmt: skip
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert not encoded.trained[: len(prompt)].any()
    assert encoded.trained[len(prompt)]
