import json

import pytest

pytest.importorskip("transformers")

from ftrain.data.chat_template import ChatTemplate, as_fields, load_tokenizer
from ftrain.data.sample import Message, Part, say


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_the_tokenizer_and_template_of_a_folder(folder, tokenizer):
    loaded = load_tokenizer(folder)
    assert loaded.chat_template == tokenizer.chat_template
    text = ChatTemplate(loaded).render(as_fields([say("user", "hi")]), prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_template_of_older_processors_is_found(folder):
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    assert ChatTemplate(load_tokenizer(folder)).render(as_fields([say("user", "hi")])) == "hi"


def test_a_model_without_a_template_is_an_error_and_another_can_be_given(folder):
    (folder / "chat_template.jinja").unlink()
    loaded = load_tokenizer(folder)
    with pytest.raises(ValueError, match="has no chat template: it is no chat model"):
        ChatTemplate(loaded)
    template = ChatTemplate(loaded, template="{{ messages[0]['content'] + shout }}", options={"shout": "!"})
    assert template.render(as_fields([say("user", "hi")])) == "hi!"


def test_a_broken_template_file_is_an_error_that_names_it(folder):
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(ValueError, match=r"chat_template\.json is no JSON"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.system('true') }}"]
)
def test_a_template_cannot_leave_its_sandbox(folder, template):
    made = ChatTemplate(load_tokenizer(folder), template=template)
    with pytest.raises(ValueError, match="the chat template refuses it"):
        made.render(as_fields([say("user", "hi")]))


def test_marked_characters_are_told():
    """By {% generation %}, as transformers has it."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    template = ChatTemplate(
        bare, template="{% for m in messages %}<{% generation %}{{ m['content'] }}{% endgeneration %}>{% endfor %}"
    )
    text, marks = template.render_marked(as_fields([say("user", "a"), say("assistant", "bcd")]))
    assert template.has_marks()
    assert [text[start:end] for start, end in marks] == ["a", "bcd"]


def test_contents_are_parts_where_a_chat_has_media():
    seen = Message("user", (Part("image", source="a.png"), Part("text", "what?")), None, {"name": "me"})
    assert as_fields([seen, say("assistant", "a cat")]) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}], "name": "me"},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
