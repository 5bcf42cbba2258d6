"""`ftrain train sft --speech`: thinker and talker of a whole Qwen3-Omni learn from chats with speech."""

import json

import numpy as np
import pytest
import torch

from ftrain.bridge.native_talking import open_talking
from ftrain.cli.main import main
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder
from ftrain.data.formats.known import detect
from ftrain.data.media.families import family_of
from ftrain.data.media_finishing import ReadMedia
from ftrain.data.packing import Plan, Shape
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place
from ftrain.run.folder import read_metrics
from ftrain.run.media import layout_of
from ftrain.run.speaking import speaking_of
from ftrain.tasks.rows import TextRows
from tests.helpers import talking_models, tiny_mimi
from tests.helpers.chat_folders import write_rows
from tests.helpers.hearing_folders import write_sounds, write_talker

transformers = pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("soundfile")
WHOLE = transformers.Qwen3OmniMoeForConditionalGeneration
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("talker"))


def codes(frames):
    return RANDOM.integers(0, 12, (frames, 4)).tolist()


def answered(*said):
    """A row of a question and an answer of these parts."""
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": list(said)}]}


def talk(answer, frames, *, voice="Ethan", asked="how?"):
    """A row whose answer is spoken."""
    said = [{"type": "text", "text": answer}, {"type": "speech", "codes": codes(frames), "voice": voice}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def rows_of(folder, rows, *, codec=None):
    """The groups of rows, and the plan and layout of their batch."""
    tokenizer, speaking = load_tokenizer(folder), speaking_of(folder, codec, device=torch.device("cpu"))
    family = family_of(folder, tokenizer)
    encode, read = TextRows(ChatEncoder(tokenizer, media=family, speaking=speaking)), ReadMedia(family)
    place = Place(str(folder / "talks.jsonl"), 1)
    return family, [read(encode(detect([row]).read(row, place))) for row in rows]


def test_a_batch_of_rows_has_the_losses_of_transformers(folder):
    """Of an answer with more frames than words, of one with fewer, of one that is heard and not spoken, in two packs;
    tokens that make room for frames count nothing.
    """
    (name,) = write_sounds(folder, [1.0])
    heard = [{"type": "audio", "audio": name}, {"type": "text", "text": "what?"}]
    silent = {"messages": [{"role": "user", "content": heard}, {"role": "assistant", "content": "a bell"}]}
    again = talk("no", 2, voice=21)
    family, groups = rows_of(folder, [talk("yes", 40), silent, {"messages": [*again["messages"] * 2]}])
    assert len(groups[0]) > len("how?yes") + 40
    model = open_talking(folder)
    plan = Plan(np.zeros(3, np.int64), np.full(2, 160), np.ones(2), Shape(160, 1, (0, 0, 16)))
    batch = layout_of(model, family, codes=4).batch([groups[:2], groups[2:]], plan, slots=0, leaves=None)
    theirs = WHOLE.from_pretrained(folder, attn_implementation="eager")
    documents = [group.documents[0] for group in groups]
    wanted = [talking_models.theirs(theirs, raw(document)) for document in documents[:2]]
    found = dict(zip(model.terms, model.loss(model.load(), batch).terms, strict=True))
    assert {name: int(mean.count) for name, mean in found.items()} == {
        "text": sum(int((d.labels >= 0).sum()) for d in documents), "codes": 41 + 3 + 3, "residuals": 3 * 44
    }  # fmt: skip
    alone = layout_of(model, family, codes=4).batch([groups[:1], groups[1:2]], plan, slots=0, leaves=None)
    of_two = dict(zip(model.terms, model.loss(model.load(), alone).terms, strict=True))
    for name, mean in of_two.items():
        torch.testing.assert_close(mean.total, sum(one[name] for one in wanted if name in one), rtol=1e-4, atol=1e-4)
    empty = layout_of(model, family, codes=4).batch([[], []], plan, slots=0, leaves=None)
    assert empty["speech"].keys() == batch["speech"].keys()


def raw(document):
    """What a document gives to transformers, without the tokens behind its last turn."""
    end = int(np.flatnonzero(document.tokens)[-1]) + 1
    leaves = {"tokens": document.tokens[:end], "labels": document.labels[:end], **document.media}
    return {name: torch.from_numpy(leaf) for name, leaf in leaves.items()}


def test_turns_that_are_not_trained_on_are_not_spoken_either(folder):
    first, last = (talk("yes", frames)["messages"] for frames in (3, 4))
    _, (group,) = rows_of(folder, [{"messages": [first[0], {**first[1], "train": False}, *last]}])
    assert group.documents[0].media["speech_frames"].tolist() == [0, 4]


def test_a_codec_makes_codes_of_recordings(folder, tmp_path):
    told = {**tiny_mimi.TINY, "codebook_size": 8, "num_quantizers": 5}
    codec = tiny_mimi.module(told)
    codec.save_pretrained(tmp_path / "codec")
    (name,) = write_sounds(folder, [0.5], rate=1200, name="said")
    said = {"type": "speech", "audio": name, "voice": "chelsie"}
    row = answered("so", said)
    _, (group,) = rows_of(folder, [row], codec=tmp_path / "codec")
    import soundfile

    wave, _ = soundfile.read(folder / name, dtype="float32")
    wanted = codec.encode(torch.from_numpy(wave)[None, None], num_quantizers=4).audio_codes[0].T
    media = group.documents[0].media
    assert media["speech"].tolist() == wanted.tolist()
    assert (media["speech_frames"].tolist(), media["speech_voices"].tolist()) == ([len(wanted)], [21])
    with pytest.raises(BadRow, match="its speech is a recording, and only a codec makes codes of it"):
        rows_of(folder, [row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (talk("yes", 3, voice="nobody"), "has the voice 'nobody': give one of chelsie, ethan"),
        (talk("yes", 3, voice=None), "has the voice None: give one of chelsie, ethan"),
        (talk("", 3), "says nothing and has speech of 3 frames"),
        ({"messages": [{"role": "user", "content": [{"type": "speech", "codes": codes(2)}]}]}, "of an assistant"),
        (answered("b", {"type": "speech", "codes": [[1, 2]], "voice": 20}),
         r"its codes are int64 \[1, 2\], not whole numbers \[frames, 4\]"),
        (answered("b", {"type": "speech", "codes": [[1, 2, 3, 12]], "voice": 20}), "codes are 0 to 11"),
    ],
)  # fmt: skip
def test_speech_that_cannot_be_learned_is_refused_by_name(folder, row, message):
    with pytest.raises(BadRow, match=message):
        rows_of(folder, [row])


@pytest.mark.slow
def test_a_run_trains_the_talker_and_its_folder_loads(folder, tmp_path, capsys):
    data = write_rows(tmp_path / "talks.jsonl", [talk(f"it is {i}", 5 + i % 2) for i in range(6)])
    words = ["train", "sft", "--model", str(folder), "--data", str(data), "--tokens", "64", "--packs", "1", "--steps",
             "2", "--rate", "1e-2", "--warmup", "0", "--held-out", "0", "--every.samples", "0"]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "run"), "--speech"]) == 0
    losses = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert {"loss/text", "loss/codes", "loss/residuals"} <= losses[0].keys()
    assert losses[-1]["loss/codes"] < losses[0]["loss/codes"]
    model, told = WHOLE.from_pretrained(tmp_path / "run/model", output_loading_info=True)
    assert not any(told.values())
    before = dict(WHOLE.from_pretrained(folder).named_parameters())
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"thinker", "talker"}
    assert main([*words, "--out", str(tmp_path / "deaf")]) == 2
    assert "it has speech, which a talker learns: `ftrain train sft --speech`" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/config.json").read_text())["speech"] is True
