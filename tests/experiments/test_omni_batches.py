"""What a step of the main job trains on: the same examples on every layout, each of them once, also after a resume."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

import ftrain
from experiments.omni import model as omni_model
from experiments.omni import sources, tasks, training
from experiments.omni.batches import Batches, fitting_budget
from experiments.omni.choice import WINDOW, window_of
from experiments.omni.corpus import Clips, Corpus, Delivery
from ftrain import optim, tree
from ftrain.modules import omni
from ftrain.modules.budget import needs
from ftrain.modules.packing import measure
from ftrain.sharding import Mesh

STEPS = 36  # not whole windows


def noise(count: int, seed: int) -> Clips:
    """Clips that need no espeak-ng, as long as spoken ones."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    how = tuple(Delivery(f"v{seed}", 175, 50) for _ in labels)
    return Clips(rng.normal(0, 0.1, (count, 7_168)).astype(np.float32), labels, np.arange(count) // 10 % 6, how)


@functools.cache
def mixture() -> tuple[tasks.Mixture, omni.OmniModel]:
    """The mixture of all tasks, and the model in its smallest size."""
    data = sources.load(omni_model.readers("smoke"), speech=Corpus(noise(120, 0), noise(60, 1)), copies=1)
    return tasks.Mixture(data, 0), omni_model.omni_model("smoke", data.words, audio=True)


def feed(packs: int = 1, parts: int = 1, *, documents: int = 128) -> Batches:
    mix, net = mixture()
    budget = fitting_budget(mix, net, documents=documents, packs=packs, parts=parts)
    names = tasks.possible(mix.sources)
    return Batches(mix, net, names, documents, budget, torch.device("cpu"), packs=packs, parts=parts)


def numbers(batches: Batches, step: int) -> list[int]:
    return [example.number for example in batches.choice.at(step)]


@functools.cache
def on_one_rank() -> list[tuple[list[int], list[tuple[int, ...]]]]:
    """The examples of each step and, where the tests look at them, their documents."""
    alone = feed(documents=64)
    return [(numbers(alone, step), documents_of(alone.at(step)) if step % 7 == 0 else []) for step in range(STEPS)]


OF_THE_SUITE = [(1, 4), (2, 1), (4, 2), (8, 4)]


@pytest.mark.parametrize(
    ("packs", "parts"),
    [
        pytest.param(packs, parts, marks=[] if (packs, parts) in OF_THE_SUITE else pytest.mark.exhaustive)
        for packs in (1, 2, 4, 8)
        for parts in (1, 2, 4)
    ],
)
def test_every_layout_trains_on_the_same_examples_in_the_same_step(packs: int, parts: int) -> None:
    """Down to the tokens that the ranks are given: none is left out, and no batch needs larger arrays."""
    laid = feed(packs, parts, documents=64)
    for step, (expected, its_documents) in enumerate(on_one_rank()):
        assert numbers(laid, step) == expected
        if its_documents:
            batch = laid.at(step)
            assert batch["tokens_T"].shape == (packs * laid.budget.tokens,)
            assert documents_of(batch) == its_documents


def documents_of(batch: dict) -> list[tuple[int, ...]]:
    """Task, tokens and labels of each document of a batch, in an order of their own."""
    ids_T, valid_T = batch["segments_T"].ids_T, batch["valid_T"]
    _, lengths = torch.unique_consecutive(ids_T[valid_T], return_counts=True)
    columns = [batch[name][valid_T].split(lengths.tolist()) for name in ("task_T", "tokens_T", "labels_T")]
    return sorted(tuple(torch.cat(parts).tolist()) for parts in zip(*columns, strict=True))


@pytest.mark.parametrize(("steps", "documents"), [(4 * WINDOW, 128), (WINDOW, 16), (2 * WINDOW, 8)])
def test_a_run_of_whole_windows_trains_on_each_example_once(steps: int, documents: int) -> None:
    """A step has its own examples but for a few, which are in another step of its window."""
    run = feed(documents=documents)
    seen = [numbers(run, step) for step in range(steps)]
    assert sorted(number for step in seen for number in step) == list(range(steps * documents))
    moved = [
        (number // documents, step) for step, held in enumerate(seen) for number in held if number // documents != step
    ]
    assert 0 < len(moved) < 0.15 * steps * documents  # the fewer documents, the more their lengths differ
    assert all(home in window_of(step) for home, step in moved)


def test_any_step_can_be_had_without_those_before_it() -> None:
    whole = feed()
    in_order = [numbers(whole, step) for step in range(STEPS)]
    backward = feed()
    assert [numbers(backward, step) for step in reversed(range(STEPS))] == in_order[::-1]
    assert numbers(feed(8), 21) == in_order[21]


def test_a_resumed_run_is_sent_the_batches_of_a_whole_one() -> None:
    """By the process that makes them, which prepares the next window as it goes."""
    alone = feed(documents=16)
    resumed = list(feed(documents=16).ahead(5, 19))
    for step, batch in zip(range(5, 19), resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(batch), tree.leaves(alone.at(step)), strict=True))


def test_windows_divide_a_run_of_any_length() -> None:
    windows = [window_of(step) for step in range(4 * WINDOW)]
    assert all(step in window for step, window in enumerate(windows))
    assert all(windows[s] == window for window in windows for s in window)


@pytest.mark.parametrize(
    "weights", [{"text_to_image": 1.0}, {"image_to_text": 1.0, "arithmetic": 1e-9}], ids=["draws", "rarely adds"]
)
def test_a_mixture_that_leaves_encoders_out_has_the_arrays_of_all(weights: dict[str, float]) -> None:
    """With room for one item of what it has not, and for the largest example of a task that it hardly draws."""
    mix, net = mixture()
    few = replace(mix, weights=weights)
    budget = fitting_budget(few, net, documents=8, packs=2, parts=2)
    run = replace(feed(), mixture=few, documents=8, budget=budget, packs=2, parts=2)
    batch = run.at(0)
    assert set(batch["encoders"]) == set(net.encoders)
    assert set(batch["decoders"]) == set(net.decoders)
    added = [tasks.sample("arithmetic", i, sources=few.sources, seed=0, split="train") for i in range(20)]
    if "arithmetic" in weights:
        needs([measure(example.document, model=net) for example in added], budget)


def test_a_budget_that_is_too_small_grows_and_loses_nothing() -> None:
    """A step's examples do not depend on the budget that they are packed to."""
    run = feed(2)
    small = replace(run, budget=replace(run.budget, tokens=run.budget.tokens // 2))
    assert documents_of(small.at(3)) == documents_of(run.at(3))
    assert small.at(3)["tokens_T"].numel() > 2 * small.budget.tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "packs", "parts"),
    [
        (Mesh(replicate=2, kind="virtual"), 2, 1),
        (Mesh(2, 2, 2, 2, kind="virtual"), 4, 2),  # more packs than documents: one has padding alone
    ],
)
def test_losses_of_every_layout_are_those_of_one_device(mesh: Mesh, packs: int, parts: int) -> None:
    """In float64 over several steps, each packed for its own layout, the balance of the experts included."""
    found, expected = losses(feed(packs, parts, documents=3), mesh), losses_of_one_device()
    for step, wanted in zip(found, expected, strict=True):
        assert step == pytest.approx(wanted, abs=1e-10, rel=0)
    assert len({step["loss"] for step in expected}) == len(expected)


@functools.cache
def losses_of_one_device() -> list[dict[str, float]]:
    return losses(feed(documents=3), None)


def losses(batches: Batches, mesh: Mesh | None, steps: int = 4) -> list[dict[str, float]]:
    """The loss of each step and of its tasks, and how many tokens it counted."""
    net = batches.model
    tx = optim.chain(optim.clip_by_global_norm(5.0), optim.skip_nonfinite(optim.adamw(1e-2)))
    made = training.train_step(net, tx, batches.tasks, training.loss_weights(batches.tasks))
    step = ftrain.jit(made, plan=None if mesh is None else training.plan(mesh), specs=omni.specs(net))
    state = in_float64(training.init_state(net, tx, ftrain.key(0)))
    found = []
    for number in range(steps):
        state, metrics = step(state, in_float64(batches.at(number)))
        terms = {task: float(value) for task, value in metrics["terms"].items()}
        found.append({"loss": float(metrics["loss"]), "tokens": int(metrics["tokens"]), **terms})
    return found


def in_float64(values: object) -> object:
    return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, values)
