"""The loop of a run: averages of what is trained, bad steps that are undone, a model's state that goes on."""

import shutil
from dataclasses import replace

import pytest
import torch

import ftrain
from ftrain import optim, tree
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder
from ftrain.resilience.anomalies import BadSteps
from ftrain.resilience.skipped import read_skipped
from ftrain.run.averages import average_of, with_average
from ftrain.run.data import DataOptions, make_data
from ftrain.run.folder import RunFolder, read_metrics
from ftrain.run.progress import Report
from ftrain.run.recipe import STATE, Recipe, kept, optimizer
from ftrain.run.session import session
from ftrain.run.training import Every, Training, train
from ftrain.tasks import NextToken
from ftrain.tasks.rows import TextRows
from tests.helpers.chat_folders import chats, write_chat_model, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_chat_model(tmp_path_factory.mktemp("model"), layers=1)
    rows = chats(40)
    for i in (5, 25):
        rows[i]["messages"][1]["content"] = "broken ~"
    write_rows(made / "chat.jsonl", rows)
    return made


def data_of(folder):
    options = DataOptions((str(folder / "chat.jsonl"),), held_out=0.0, tokens=128, packs=1, steps=10)
    return make_data(options, TextRows(ChatEncoder(load_tokenizer(folder))), ranks=1, seed=0)


def recipe_of(model, **options):
    return Recipe(model, NextToken(), optimizer(optim.constant(1e-2), clip=1.0, weight_decay=0.0, **options))


def test_an_average_begins_with_the_folders_weights_and_follows_what_is_trained(folder):
    recipe, data = recipe_of(ftrain.hf.open(folder), ema=0.5), data_of(folder)
    state = recipe.init(ftrain.key(0))
    recipe.load(state)
    expected = tree.leaves(tree.map(torch.clone, state.params))
    assert all(map(torch.equal, tree.leaves(average_of(state)), expected))
    step = ftrain.jit(recipe.train_step)
    for number, read in zip((1, 2, 3), data.loader, strict=False):
        state, _ = step(state, read.batch)
        weight = 1 - min(0.5, (1 + number) / (10 + number))
        expected = [torch.lerp(a, p, weight) for a, p in zip(expected, tree.leaves(state.params), strict=True)]
    for found, wanted in zip(tree.leaves(with_average(state).params), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.equal(state.params["norm"]["weight_D"], with_average(state).params["norm"]["weight_D"])


def run_of(recipe, folder, out, bad):
    """Ten steps of one pack each, saved after each second."""
    data = data_of(folder)
    files = RunFolder.resume(out, step=8) if out.exists() else RunFolder.create(out, {})
    with session(kind="process") as ranks, files:
        t = Training(
            recipe, data.loader, out, files, Report(10, every=100), 10, every=Every(save=2, evaluate=0), bad=bad
        )
        return train(t, ranks)


def test_batches_of_bad_steps_are_left_out_and_the_steps_before_stay(folder, tmp_path):
    model = ftrain.hf.open(folder)
    tilde = load_tokenizer(folder).convert_tokens_to_ids("~")

    def loss(params, batch, key=None):
        mean = model.loss(params, batch, key)
        broken = ftrain.kernels.mean.sum_over_batch((batch["tokens"] == tilde).sum()) > 0
        return ftrain.Mean(torch.where(broken, float("nan"), mean.total), mean.count)

    recipe = recipe_of(replace(model, loss=loss))
    plain = run_of(recipe, folder, tmp_path / "plain", None)
    losses = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "plain")}
    bad = [step for step, value in losses.items() if value != value]
    assert bad
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(plain.params))
    run_of(recipe, folder, tmp_path / "mended", BadSteps(limit=1))
    mended = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "mended")}
    assert list(mended) == list(range(1, 11))
    assert all(value == value for value in mended.values())
    first = bad[0]
    assert {k: v for k, v in mended.items() if k < first} == {k: v for k, v in losses.items() if k < first}
    assert read_skipped(tmp_path / "mended").positions[0] == first - 1
    assert (tmp_path / "mended" / "replay" / f"step_{first}" / "batch.safetensors").is_file()
    shutil.rmtree(tmp_path / "mended" / "checkpoints" / "global_step_10")  # and a run that goes on leaves them out too
    again = run_of(recipe, folder, tmp_path / "mended", None)
    assert {row["step"]: row["loss"] for row in read_metrics(tmp_path / "mended")} == mended
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(again.params))


def test_the_state_of_a_model_goes_on_with_the_steps(folder, tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = torch.nn.Embedding(260, 8), torch.nn.BatchNorm1d(8)
            self.head = torch.nn.Linear(8, 260)

        def forward(self, tokens):
            return self.head(self.norm(self.table(tokens)))

    def cross_entropy(scores, batch):
        found = torch.nn.functional.cross_entropy(scores, batch["labels"], reduction="sum")
        return ftrain.Mean(found, (batch["labels"] != -100).sum().float())

    torch.manual_seed(0)
    model = ftrain.bridge.from_module(Net(), cross_entropy)
    with pytest.raises(ValueError, match="micro_batches=1, not 2"):
        replace(recipe_of(model), micro_batches=2)
    recipe = recipe_of(model)
    state = recipe.init(ftrain.key(0))
    before = {path: leaf.clone() for path, leaf in zip(tree.paths(model.state), tree.leaves(model.state), strict=True)}
    step = ftrain.jit(recipe.train_step, donate="state")
    for read, _ in zip(data_of(folder).loader, range(2), strict=False):
        batch = {"tokens": read.batch["tokens"], "labels": read.batch["labels"]}
        state, _ = step(state, batch)
    after = dict(zip(tree.paths(state.extra[STATE]), tree.leaves(state.extra[STATE]), strict=True))
    assert int(after["norm.num_batches_tracked"]) == 2
    assert not torch.equal(after["norm.running_mean"], before["norm.running_mean"])
    assert set(kept(state).extra) == {STATE}
    assert torch.equal(model.state["norm"]["running_mean"], before["norm.running_mean"])


def test_a_held_out_loss_of_several_is_the_first(folder):
    """Tokens further ahead, or a weight on chosen answers, help to learn; they are no part of what is compared."""
    model = ftrain.hf.open(folder)

    def loss(params, batch, key=None):
        mean = model.loss(params, batch, key)
        return ftrain.weighted_sum({"next": mean, "further": ftrain.Mean(mean.total * 3, mean.count)}, {"further": 0.1})

    recipes = recipe_of(model), recipe_of(replace(model, loss=loss))
    read = next(iter(data_of(folder).loader))
    states = [recipe.init(ftrain.key(0)) for recipe in recipes]
    found = [recipe.evaluate(state, read.batch)["loss"] for recipe, state in zip(recipes, states, strict=True)]
    assert found[1].item() == found[0].item()
    assert found[1].count == (read.batch["labels"] != -100).sum()
