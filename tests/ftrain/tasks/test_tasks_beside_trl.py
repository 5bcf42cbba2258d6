"""Losses of tasks on rows of a data file, beside those of TRL's trainers on the same rows, model and adapter."""

import pytest
import torch

import ftrain
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.documents import lay
from ftrain.data.encoding import ChatEncoder
from ftrain.data.sample import Chat, Judged, Place, Preference, say
from ftrain.tasks import Dpo, Kto, NextToken
from ftrain.tasks.rows import JudgedRows, PreferenceRows, TextRows
from tests.helpers.chat_folders import TEMPLATE, write_chat_model

pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ENDS = TEMPLATE.replace("'<|end|>' + '\n'", "'<|end|>'")
"""TRL trains on what a template writes behind the stop token, too: here it writes nothing there."""
PLACE = Place("rows", 1)
QUESTIONS = ("say one", "say two!!", "what is three?", "and four")
ANSWERS = ("one", "it is two", "three, of course", "4")
OTHERS = ("no", "I do not know that", "five", "never heard of it, sorry")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("model"), template=ENDS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The same architecture with other weights."""
    return write_chat_model(tmp_path_factory.mktemp("reference"), seed=1)


def module(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def common(out):
    return {
        "output_dir": str(out), "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "max_length": None,
    }  # fmt: skip


def turn(role, text):
    return [{"role": role, "content": text}]


def loss_of(trainer):
    """TRL's own loss of the first batch that its own loader makes."""
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.compute_loss(trainer.model, batch).item()


def packed(groups):
    return lay(groups, tokens=sum(map(len, groups)) + 5)


def opened(folder):
    model = ftrain.hf.open(folder)
    return model, model.load()


def test_supervised_fine_tuning(folder, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": turn("user", q), "completion": turn("assistant", a)} for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    trainer = SFTTrainer(
        module(folder), args=SFTConfig(**common(tmp_path)), train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(folder),
    )  # fmt: skip
    encode, (model, params) = TextRows(ChatEncoder(load_tokenizer(folder))), opened(folder)
    groups = [
        encode(Chat((say("user", q), say("assistant", a)), place=PLACE))
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    ours = NextToken().loss(model, params, packed(groups))[0].item()
    assert ours == pytest.approx(loss_of(trainer), rel=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_preferences(folder, reference, tmp_path, kind):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": turn("user", q), "chosen": turn("assistant", a), "rejected": turn("assistant", b)}
        for q, a, b in zip(QUESTIONS, ANSWERS, OTHERS, strict=True)
    ]
    trainer = DPOTrainer(
        module(folder), ref_model=module(reference), args=DPOConfig(loss_type=[kind], beta=0.3, **common(tmp_path)),
        train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(folder),
    )  # fmt: skip
    encode, (model, params), (_, theirs) = (
        PreferenceRows(ChatEncoder(load_tokenizer(folder))), opened(folder), opened(reference)
    )  # fmt: skip
    groups = [
        encode(Preference((say("user", q),), (say("assistant", a),), (say("assistant", b),), place=PLACE))
        for q, a, b in zip(QUESTIONS, ANSWERS, OTHERS, strict=True)
    ]
    ours = Dpo(beta=0.3, kind=kind).loss(model, params, packed(groups), reference=theirs)[0].item()
    assert ours == pytest.approx(loss_of(trainer), rel=1e-4)


def test_judged_answers(folder, reference, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    good = (True, False, True, False)
    rows = [
        {"prompt": turn("user", q), "completion": turn("assistant", a), "label": g}
        for q, a, g in zip(QUESTIONS, ANSWERS, good, strict=True)
    ]
    trainer = KTOTrainer(
        module(folder), ref_model=module(reference),
        args=KTOConfig(beta=0.3, train_sampling_strategy="sequential", **common(tmp_path)),
        train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(folder),
    )  # fmt: skip
    encode, (model, params), (_, theirs) = (
        JudgedRows(ChatEncoder(load_tokenizer(folder))), opened(folder), opened(reference)
    )  # fmt: skip
    judged = [
        Judged((say("user", q),), (say("assistant", a),), g, place=PLACE)
        for q, a, g in zip(QUESTIONS, ANSWERS, good, strict=True)
    ]
    groups = [encode((judged[i], judged[i - 1])) for i in range(4)]  # TRL pairs a prompt with the answer before
    ours = Kto(beta=0.3).loss(model, params, packed(groups), reference=theirs)[0].item()
    assert ours == pytest.approx(loss_of(trainer), rel=1e-4)
