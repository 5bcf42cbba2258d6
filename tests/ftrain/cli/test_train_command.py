"""`ftrain train`: a folder and a file in, a run and a folder out, whatever the ranks, and again where it stopped."""

import contextlib
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ftrain
from ftrain import lora, optim
from ftrain.cli.main import main
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder
from ftrain.data.subset import hold_out
from ftrain.modules.spec import leaves_with_paths
from ftrain.resilience.signals import EXIT_RESUMABLE
from ftrain.run.data import DataOptions, make_data
from ftrain.run.folder import read_config, read_metrics
from ftrain.run.recipe import Recipe, optimizer
from ftrain.tasks import NextToken
from ftrain.tasks.rows import TextRows
from tests.helpers.chat_folders import chats, judgements, preferences, write_chat_model, write_rows
from tests.helpers.rank_processes import run_module
from tests.helpers.seeing_folders import write_qwen

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "chat.jsonl", chats(60))


@pytest.fixture(scope="module")
def whole(model, chat_file, tmp_path_factory):
    """A run of one device that trains all parameters, and what it said."""
    out, said = tmp_path_factory.mktemp("whole") / "run", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(command("sft", model, chat_file, out, "--held-out", "0.1", "--track", "tensorboard")) == 0
    return out, said.getvalue()


@pytest.fixture(scope="module")
def adapted(model, chat_file, tmp_path_factory):
    """A run of one device that trains an adapter."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    assert main(command("sft", model, chat_file, out, *ADAPTER, "--save-merged")) == 0
    return out


ADAPTER = ("--lora.rank", "4", "--every.save", "2")


def command(task, model, data, out, *more):
    """The words of a short run: packs of 128 tokens, 2 in a step."""
    return [
        "train", task, "--model", str(model), "--data", str(data), "--out", str(out), "--tokens", "128", "--packs", "2",
        "--steps", "4", "--rate", "1e-2", "--warmup", "0", *more,
    ]  # fmt: skip


def losses(out):
    return [row["loss"] for row in read_metrics(out) if "loss" in row]


def held_out(out):
    return [row["held_out"] for row in read_metrics(out) if "held_out" in row]


def test_all_parameters_are_trained_and_written_as_a_folder_that_transformers_loads(model, whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, shown = whole
    assert "60 rows of the format" in shown
    assert "54 rows are trained on and 6 held out" in shown
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 0, 4, 4]
    assert samples[0]["prompt"].endswith("<|start|>assistant\n")
    first, last = held_out(run)
    assert last < first - 0.5
    folder = run / "model"
    trained = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([[5, 6, 7, 8]])
    ours = ftrain.hf.open(folder)
    torch.testing.assert_close(
        ours.logits(ours.load(), {"tokens": tokens[0]}), trained(tokens).logits[0].detach(), rtol=1e-4, atol=1e-4
    )
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(model).chat_template


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks it
def test_an_adapter_is_trained_beside_the_frozen_model_and_peft_loads_it(model, adapted):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    first, last = held_out(adapted)
    assert last < first
    tokens = torch.tensor([[5, 6, 7, 8]])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapted / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(adapted / "model")
    torch.testing.assert_close(theirs(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)


def cut_after_step_2(run, out):
    """A copy of a run, as it was when its first save was made; the words that let it go on."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "global_step_4")
    (out / "checkpoints" / "latest").unlink(missing_ok=True)
    return ["train", "sft", "--config", str(out / "config.json"), "--out", str(out)]


def weights(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_goes_on_where_its_last_save_is_with_the_same_bits(adapted, tmp_path):
    cut = tmp_path / "cut"
    assert main(cut_after_step_2(adapted, cut)) == 0
    assert losses(cut) == losses(adapted)
    assert weights(cut) == weights(adapted)


def test_a_run_goes_on_on_other_ranks_and_its_checkpoint_is_exported(adapted, tmp_path):
    cut = tmp_path / "cut"
    go_on = cut_after_step_2(adapted, cut)
    assert main(["export", str(cut), "--to", str(tmp_path / "half"), "--merged"]) == 0
    assert {path.name for path in (tmp_path / "half").iterdir()} == {"adapter", "model"}
    assert weights(tmp_path / "half") != weights(adapted)
    assert main([*go_on, "--shard", "2"]) == 0
    assert losses(cut) == pytest.approx(losses(adapted), rel=1e-4)
    assert main(["export", str(adapted), "--to", str(tmp_path / "again")]) == 0
    assert weights(adapted) == weights(tmp_path / "again")


def test_a_run_that_is_stopped_saves_and_goes_on_with_the_same_command(model, chat_file, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    words = [*command("sft", model, chat_file, out, "--steps", "40"), "--every.save", "0", "--held-out", "0"]
    running = subprocess.Popen([sys.executable, "-m", "ftrain", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    while running.poll() is None and not ((out / "metrics.jsonl").is_file() and len(losses(out)) > 2):
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=120) == EXIT_RESUMABLE
    done = len(losses(out))
    assert 2 < done < 40
    assert not (out / "model").exists()
    assert main(words) == 0
    assert main([*command("sft", model, chat_file, whole, "--steps", "40"), "--held-out", "0"]) == 0
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("sizes", [("--shard", "2"), ("--replicate", "2"), ("--sequence", "2")])
def test_ranks_train_on_the_same_packs_with_the_same_losses(model, chat_file, whole, tmp_path, sizes):
    one, many = whole[0], tmp_path / "many"
    assert main(command("sft", model, chat_file, many, "--held-out", "0.1", *sizes)) == 0
    assert losses(many) == pytest.approx(losses(one), rel=1e-4)
    facts = [[row["documents"] for row in read_metrics(out) if "loss" in row] for out in (one, many)]
    assert facts[0] == facts[1]


def test_processes_that_have_all_of_the_model_each_write_it_once(model, chat_file, whole, tmp_path):
    words = command("sft", model, chat_file, tmp_path / "many", "--held-out", "0.1", "--replicate", "2", "--shard", "1")
    ended = run_module("ftrain", 2, tmp_path, *words)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert losses(tmp_path / "many") == pytest.approx(losses(whole[0]), rel=1e-4)
    sizes = [(out / "model" / "model.safetensors").stat().st_size for out in (tmp_path / "many", whole[0])]
    assert sizes[0] == sizes[1]


def test_a_layout_that_was_searched_trains_as_one_device(model, chat_file, tmp_path, capsys):
    assert main(command("sft", model, chat_file, tmp_path / "one")) == 0
    assert main(command("sft", model, chat_file, tmp_path / "many", "--plan", "auto", "--shard", "2")) == 0
    assert "of auto" in capsys.readouterr().out
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


_LONG = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("task", "format"),
    [("sft", "nf4"), pytest.param("dpo", "int8", marks=_LONG), pytest.param("dpo", "nf4", marks=_LONG),
     pytest.param("sft", "int8", marks=_LONG)],
)  # fmt: skip
def test_a_quantized_model_is_trained_by_its_adapter(model, chat_file, adapted, tmp_path, task, format):
    data = chat_file if task == "sft" else write_rows(tmp_path / "p.jsonl", preferences(40))
    small, two = tmp_path / "small", tmp_path / "two"
    options = ("--lora.rank", "4", "--rate", "3e-3", "--lora.quantize", format, "--lora.plus", "4")
    assert main(command(task, model, data, small, *options)) == 0
    plain = losses(adapted)[0] if task == "sft" else math.log(2)  # at the first step nothing is preferred yet
    assert losses(small)[0] == pytest.approx(plain, rel=0.05)
    assert losses(small)[-1] < losses(small)[0]
    assert main(command(task, model, data, two, *options, "--shard", "2")) == 0
    assert losses(two) == pytest.approx(losses(small), rel=1e-4)


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_other_adapters_begin_at_the_model_and_peft_reads_them(model, chat_file, adapted, tmp_path, kind):
    assert main(command("sft", model, chat_file, tmp_path / kind, "--lora.rank", "4", f"--lora.{kind}")) == 0
    assert losses(tmp_path / kind)[0] == pytest.approx(losses(adapted)[0], rel=1e-5)
    assert losses(tmp_path / kind)[-1] < losses(tmp_path / kind)[0]
    config = json.loads((tmp_path / kind / "adapter" / "adapter_config.json").read_text())
    assert config[f"use_{kind}"] is True


@pytest.mark.parametrize("adapter", [(), ("--lora.rank", "4")])
def test_preferences_move_the_chosen_answers_up(model, tmp_path, adapter):
    data, out = write_rows(tmp_path / "p.jsonl", preferences(40)), tmp_path / "run"
    assert main(command("dpo", model, data, out, *adapter, "--held-out", "0")) == 0
    rows = read_metrics(out)
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["loss/margin"] > 0


def test_judged_answers_are_trained_on(model, tmp_path):
    data, out = write_rows(tmp_path / "k.jsonl", judgements(40)), tmp_path / "run"
    assert main(command("kto", model, data, out, "--held-out", "0")) == 0
    rows = read_metrics(out)
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-3)
    assert rows[-1]["loss/good"] > rows[-1]["loss/bad"]


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(("--only", "layers.1", "norm"), marks=_LONG),  # alike on ranks, which the last one has
        ("--freeze", "embedding", "head", "layers.0"),
        ("--only", "layers.1", "norm", "--shard", "2"),
    ],
)
def test_parts_that_are_frozen_keep_every_bit(model, chat_file, tmp_path, which):
    out = tmp_path / "run"
    assert main(command("sft", model, chat_file, out, *which)) == 0
    before, after = (ftrain.hf.open(folder).load() for folder in (model, out / "model"))
    same = {path for path, spec in leaves_with_paths(before) if torch.equal(spec, dict(leaves_with_paths(after))[path])}
    every = {path for path, _ in leaves_with_paths(before)}
    assert every - same == {path for path in every if path.startswith(("layers.1.", "norm"))}
    assert losses(out)[-1] < losses(out)[0]


def test_globs_of_what_is_trained_are_refused_where_they_mean_nothing(model, chat_file, tmp_path, capsys):
    for words, says in (
        (("--freeze", "layers.9"), "matches nothing; nearest"),
        (("--freeze", "**"), "nothing is left to train"),
        (("--freeze", "head", "--only", "head"), "give one"),
        (("--freeze", "head", "--lora.rank", "2"), "an adapter freezes all"),
    ):
        assert main(command("sft", model, chat_file, tmp_path / "run", *words)) == 2
        assert says in capsys.readouterr().err


def answers(folder, text):
    """What transformers' classifier of a folder says of a text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    return AutoModelForSequenceClassification.from_pretrained(folder)(torch.tensor([ids])).logits[0].detach()


@pytest.mark.parametrize("sizes", [pytest.param((), marks=_LONG), ("--shard", "2")])
def test_classes_are_learned_and_the_folder_is_a_classifier_of_transformers(model, tmp_path, sizes):
    rows = [{"text": word * (1 + i % 3), "label": label} for i in range(30) for label, word in enumerate(("ab", "xy"))]
    data, out = write_rows(tmp_path / "c.jsonl", rows), tmp_path / "run"
    assert main(command("classify", model, data, out, "--steps", "12", *sizes)) == 0
    assert read_metrics(out)[-2]["loss/accuracy"] == 1
    assert [int(answers(out / "model", word).argmax()) for word in ("ab", "xyxy")] == [0, 1]


def test_rewards_of_chosen_answers_are_above_those_of_rejected_ones(model, tmp_path):
    data, out = write_rows(tmp_path / "p.jsonl", preferences(40)), tmp_path / "run"
    assert main(command("reward", model, data, out, "--steps", "8", "--held-out", "0", "--lora.rank", "4")) == 0
    rows = read_metrics(out)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (out / "adapter" / "score.safetensors").is_file()


def test_a_head_that_no_folder_could_hold_is_refused_before_it_is_trained(tmp_path, capsys):
    data, out = write_rows(tmp_path / "c.jsonl", [{"text": "ab", "label": i} for i in (0, 1)]), tmp_path / "run"
    assert main(command("classify", write_qwen(tmp_path / "sees", layers=1), data, out, "--steps", "1")) == 2
    assert "names Qwen2_5_VLForConditionalGeneration: train an adapter" in capsys.readouterr().err
    assert not out.exists()


def test_questions_come_near_their_answers(model, tmp_path):
    rows = [{"query": f"q{i} " * 2, "positive": f"{i} is it", "negatives": ["none of it"]} for i in range(24)]
    data, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "run"
    assert main(command("embed", model, data, out, "--steps", "10", "--held-out", "0", "--rate", "3e-3")) == 0
    assert sum(losses(out)[-3:]) < sum(losses(out)[:3])


def test_a_student_comes_closer_to_its_teacher(model, chat_file, tmp_path):
    teacher = write_chat_model(tmp_path / "teacher", seed=1, layers=1)
    out = tmp_path / "run"
    assert main(command("kd", model, chat_file, out, "--teacher", str(teacher))) == 0
    assert losses(out)[-1] < losses(out)[0]
    strange = write_chat_model(tmp_path / "strange", vocab=270)
    assert main(command("kd", model, chat_file, tmp_path / "other", "--teacher", str(strange))) == 2


def test_numbers_of_a_run_go_to_tensorboard_too(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = whole
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(out))


def test_options_come_from_a_file_and_flags_go_before_them(model, chat_file, tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text(
        f"model: {model}\ndata: [{chat_file}]\nout: {tmp_path / 'run'}\ntokens: 64\npacks: 1\nsteps: 3\n"
        "lora:\n  rank: 2\n  rslora: true\n"
    )
    assert main(["train", "sft", "--config", str(file), "--steps", "1", "--lora.rank", "3"]) == 0
    config = read_config(tmp_path / "run")
    assert (config["steps"], config["tokens"], config["lora"]["rank"], config["lora"]["rslora"]) == (1, 64, 3, True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modle: x\n", "no option is called modle; did you mean model?"),
        ("lora:\n  rnak: 3\n", "no option is called lora.rnak; did you mean lora.rank?"),
        ("model: x\nmodel: y\n", "line 2: the key 'model' is there twice"),
        ("- a\n", "not a mapping of options"),
        ("lora: 3\n", "lora holds options of its own"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_the_nearest_name(tmp_path, capsys, text, says):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert main(["train", "sft", "--config", str(file)]) == 2
    assert says in capsys.readouterr().err


def swap_tokens(file):
    """Another tokenizer of the same size: two of its tokens have each other's ids."""
    made = json.loads(file.read_text())
    words = made["model"]["vocab"]
    one, other = (next(word for word, number in words.items() if number == n) for n in (2, 3))
    words[one], words[other] = 3, 2
    file.write_text(json.dumps(made))


def wrong(model, chat_file, tmp_path):
    """Commands that cannot be carried out, and what is said of them."""
    broken = write_rows(tmp_path / "odd.jsonl", [{"colour": "red", "size": 3}] * 5)
    long = write_rows(tmp_path / "long.jsonl", [{"text": "word " * 200}] * 5)
    half = write_rows(tmp_path / "half.jsonl", [*chats(10), *[{"messages": None}] * 10])
    other = shutil.copytree(model, tmp_path / "other")
    swap_tokens(other / "tokenizer.json")
    run = lambda task, data, *more: command(task, model, data, tmp_path / "run", *more)  # noqa: E731
    return {
        "format": (run("sft", broken), "colour"),
        "kind": (run("dpo", chat_file), "dpo|prefer|format"),
        "absent": (run("sft", tmp_path / "none.jsonl"), "none.jsonl"),
        "model": (command("sft", tmp_path / "nowhere", chat_file, tmp_path / "run"), "no such folder"),
        "long": (run("sft", long), "none of 5 rows|rejected|too long"),
        "packs": (run("sft", chat_file, "--shard", "2", "--packs", "3"), "do not divide among 2 ranks"),
        "tracker": (run("sft", chat_file, "--track", "tensorbord"), "not one of tensorboard"),
        "adapter": (run("sft", chat_file, "--lora.dora"), "--lora.dora is of an adapter, and --lora.rank is 0"),
        "no packs": (run("sft", chat_file, "--packs", "0"), "--packs 0 must be at least 1"),
        "no epochs": (run("sft", chat_file, "--epochs", "0"), "--epochs 0 must be at least 1"),
        "broken": (run("sft", half), "50.0%, more than 5.0%, of 20 rows were rejected"),
        "teacher": (run("kd", chat_file, "--teacher", str(other)), "has the id 2 for the student, and the id 3"),
        "target": (run("sft", chat_file, "--lora.rank", "2", "--lora.targets", "q_porj"), "q_porj"),
    }


CASES = (
    "format", "kind", "absent", "model", "long", "packs", "tracker", "adapter", "no packs", "no epochs", "broken",
    "teacher", "target",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_trained_is_one_sentence_and_leaves_nothing(case, model, chat_file, tmp_path, capsys):
    words, says = wrong(model, chat_file, tmp_path)[case]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("ftrain: ")
    assert any(word in error for word in says.split("|")), error
    assert not (tmp_path / "run").exists()


def test_a_run_that_failed_before_its_first_save_begins_anew_with_mended_options(model, chat_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command("sft", model, chat_file, out, "--budget", "1KiB")) == 2
    assert not out.exists()  # what cannot be is refused before anything is written
    assert main(command("sft", model, chat_file, out, "--rate", "1e30", "--every.give-up", "1")) == 2
    assert (out / "config.json").is_file()
    assert main(command("sft", model, chat_file, out, "--seed", "1", "--held-out", "0.1")) == 0
    assert read_config(out)["seed"] == 1
    assert [row["step"] for row in read_metrics(out) if "held_out" in row] == [0, 4]


def test_the_only_held_out_row_may_be_broken(model, tmp_path, caplog):
    data = write_rows(tmp_path / "a.jsonl", chats(60))
    held = make_data(DataOptions((str(data),), tokens=128), encode(model), ranks=1, seed=0).held_out
    assert len(list(held)) == 1
    rows = chats(60)
    rows[held_out_row(60)] = {"messages": None}
    write_rows(data, rows)
    assert not make_data(DataOptions((str(data),), tokens=128), encode(model), ranks=1, seed=0).held_out
    assert "1 of 1 held-out rows cannot be used" in caplog.text
    bad = write_rows(tmp_path / "bad.jsonl", [{"messages": None}] * 5)
    with pytest.raises(ValueError, match=r"--held-out-data .*none of 5 rows can be used"):
        make_data(DataOptions((str(data),), held_out_data=(str(bad),)), encode(model), ranks=1, seed=0)


def encode(model):
    return TextRows(ChatEncoder(load_tokenizer(model)))


def held_out_row(count):
    """The number of the row that is held out of so many, of which one is."""
    (row,) = hold_out(range(count), 0.02, key=0)[1]
    return row


def test_the_seed_chooses_what_dropout_drops(model):
    opened = ftrain.hf.open(model)
    adapter = lora.add(opened, ("all-linear",), rank=2, alpha=4.0, dropout=0.5)
    tokens = torch.arange(32)
    batch = {"tokens": tokens, "labels": tokens + 1, "segments": torch.zeros(32, dtype=torch.int64)}

    def loss(seed):
        tx = optimizer(optim.constant(1e-3), clip=1.0, weight_decay=0.0)
        recipe = Recipe(opened, NextToken(), tx, adapter, seed=seed)
        state = recipe.init(ftrain.key(0))
        noisy = ftrain.tree.map(lambda leaf: leaf + 0.3, state.params)
        return float(recipe.train_step(state.replace(params=noisy), batch)[1]["loss"])

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)


def test_a_run_does_not_go_on_with_other_options(model, chat_file, whole, capsys):
    assert main(command("sft", model, chat_file, whole[0], "--held-out", "0.1", "--seed", "1")) == 2
    assert "seed = 0, and these options say 1" in capsys.readouterr().err
    assert json.loads((whole[0] / "config.json").read_text())["seed"] == 0
