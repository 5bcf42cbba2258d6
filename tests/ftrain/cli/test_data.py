import subprocess
import sys

import pytest
import tyro

from ftrain.cli import data

ROWS = (
    '{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}]}\n'
    '{"messages": [{"role": "user", "content": "nobody answers"}]}\n{broken\n'
)


@pytest.fixture
def chat(tmp_path):
    (tmp_path / "chat.jsonl").write_text(ROWS)
    return tmp_path / "chat.jsonl"


@pytest.fixture
def model(tmp_path):
    """A folder with a tokenizer of single characters and a chat template."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_stats_of_a_file(chat, model, capsys):
    options = tyro.cli(data.Data, args=["stats", str(chat), "--model", str(model)])
    assert data.run(options) == 0
    said = capsys.readouterr().out
    for line in (
        "3 rows of the format openai",
        "1 of 3 rows can be trained on, 2 are rejected",
        f"{chat}: 1 x nothing to train on (row 2)",
        f"{chat}: 1 x invalid JSON (row 3)",
        "31 tokens, 16.1% trained on",
    ):
        assert line in said.replace("\n  ", " ")


def test_rows_are_shown_with_marks_where_there_are_no_colours_and_on_a_page(chat, model, tmp_path, capsys):
    page = tmp_path / "rows.html"
    options = tyro.cli(data.Data, args=["show", str(chat), "-n", "3", "--model", str(model), "--html", str(page)])
    assert data.run(options) == 0
    said = capsys.readouterr().out
    assert "<|im_start|>assistant\n⟦four<|im_end|>⟧" in said
    assert said.count("rejected: ") == 2
    assert "<mark>four&lt;|im_end|&gt;</mark>" in page.read_text()


def test_all_rows_rejected_is_a_failure_and_what_cannot_be_read_an_error(chat, tmp_path):
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    assert data.run(data.Data(data.DataStats((str(tmp_path / "null.jsonl"),)))) == 1
    for options, said in (
        (data.DataStats(("none.jsonl",)), "there is no such file"),
        (data.DataStats(()), "no data"),
        (data.DataStats((str(chat),), format="opneai"), "did you mean 'openai'"),
        (data.DataShow((str(chat),), n=0), "at least 1 row"),
    ):
        with pytest.raises(ValueError, match=said):
            data.run(data.Data(options))


def test_a_folder_without_a_tokenizer_is_an_error(chat, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    for folder, said in ((tmp_path / "empty", "holds no tokenizer"), (tmp_path / "none", "no such folder")):
        with pytest.raises(ValueError, match=said):
            data.run(data.Data(data.DataStats((str(chat),), model=folder)))


def test_the_command_loads_no_readers_before_they_are_used():
    script = (
        "import sys; from ftrain.cli import data\n"
        "print([m for m in ('transformers', 'pyarrow', 'PIL', 'av', 'soundfile', 'fsspec') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    ("module", "needs", "extra"),
    [
        ("sources.parquet", "pyarrow", "train"), ("sources.arrow", "pyarrow", "train"),
        ("sources.remote", "fsspec", "train"), ("encoding", "transformers", "train"),
        ("media.images", "PIL", "media"), ("media.audio", "soundfile", "media"), ("media.audio_av", "av", "media"),
        ("media.film_frames", "av", "media"),
    ],
)  # fmt: skip
def test_an_absent_package_is_named_with_its_extra(module, needs, extra):
    script = f"import sys; sys.modules[{needs!r}] = None\nimport ftrain.data.{module}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: ")
    assert last.endswith(f'pip install "ftrain-omni[{extra}]"')
