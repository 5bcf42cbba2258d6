"""Blocks of one's own in compiled steps: recompute by layer, meshes, no second trace, Hugging Face's folders.

tests/modules/test_own_blocks.py compares them with their definitions.
"""

import dataclasses
import functools

import pytest
import torch

import ftrain
from ftrain import TrainState, optim, tree
from ftrain.hf.load import load_hf
from ftrain.hf.save import save_hf
from ftrain.kernels import random
from ftrain.modules import decoder, spec
from ftrain.modules.block import Block, Cache, Context
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.hf_config import hf_config
from ftrain.modules.hf_names import decoder_names, named
from ftrain.sharding import Layout, Mesh, Ring, Ulysses
from tests.helpers.mesh_models import Model, compare, language_model, plan_for
from tests.helpers.own_blocks import BASE, CONFIGS, bilinear


@functools.cache
def model(name: str) -> Model:
    cfg = CONFIGS[name]
    return language_model(dataclasses.replace(cfg, layers=max(2, len(cfg.pattern))))


@pytest.mark.parametrize("name", ["mixed", "experts beside"])
def test_recompute_by_layer_changes_no_bit(name: str) -> None:
    made = model(name)
    batch, params = made.batch(1), made.params(torch.float32)
    plain, again = ftrain.jit(made.step), ftrain.jit(made.step, remat="layer")
    for a, b in zip(tree.leaves(plain(params, batch)), tree.leaves(again(params, batch)), strict=True):
        assert torch.equal(a, b)
    assert again.lower(params, batch).memory().peak < plain.lower(params, batch).memory().peak


@pytest.mark.exhaustive  # below, sequences are divided too
@pytest.mark.parametrize("name", ["mixed", "experts beside"])
def test_parameters_divided_over_two_ranks(name: str) -> None:
    made = model(name)
    loss, gradients = compare(made, plan_for(made, Mesh(shard=2, kind="virtual")), dtype=torch.float64)
    assert loss < 1e-10
    assert gradients < 1e-10


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("mlp", Ulysses()),
        ("attention", Ring()),
        ("attention in plain torch", Ulysses()),
        ("memory", Ring()),
        ("mixed", Ulysses()),
        ("experts beside", Ring()),
    ],
    ids=str,
)
def test_sequences_divided_too(name: str, how: Ulysses | Ring) -> None:
    made, mesh = model(name), Mesh(shard=2, sequence=2, kind="virtual")
    loss, gradients = compare(made, plan_for(made, mesh, Layout(sequence=how)), dtype=torch.float64)
    assert loss < 1e-10
    assert gradients < 1e-10


@pytest.mark.parametrize("name", ["experts", "experts beside"])
def test_experts_divided_over_two_ranks(name: str) -> None:
    made, mesh = model(name), Mesh(shard=2, expert=2, kind="virtual")
    loss, gradients = compare(made, plan_for(made, mesh), dtype=torch.float64)
    assert loss < 1e-10
    assert gradients < 1e-10


@pytest.mark.parametrize("name", ["mixed", "experts beside"])
def test_a_second_call_does_not_trace(name: str) -> None:
    made, tx = language_model(CONFIGS[name]), optim.adamw(1e-3)

    def train_step(state: TrainState, batch: dict) -> tuple:
        (loss, _), grads = ftrain.value_and_grad(made.loss, has_aux=True)(state.params, batch)
        return state.apply(tx, grads), {"loss": loss}

    step = ftrain.jit(train_step, donate="state")
    state = TrainState.create(made.params(torch.float32), tx)
    losses = []
    for _ in range(4):
        state, metrics = step(state, made.batch(1))
        losses.append(float(metrics["loss"]))
    assert step.traces == 1
    assert losses[-1] < losses[0]


STRENGTH = 1.0


def test_a_number_that_a_block_reads_is_part_of_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = Block(lambda gain: {}, lambda params, x_TD, at: STRENGTH * x_TD)
    made = language_model(dataclasses.replace(BASE, layers=2, pattern=(decoder.layer_with(BASE, mlp=scaled),)))
    params, batch = made.params(torch.float64), made.batch(1)
    step = ftrain.jit(lambda p, b: made.loss(p, b)[0].value())
    step(params, batch)
    monkeypatch.setitem(globals(), "STRENGTH", 2.0)
    with pytest.warns(UserWarning, match="traced again.*STRENGTH"):
        found = step(params, batch)
    torch.testing.assert_close(found, made.loss(params, batch)[0].value())
    assert step.traces == 2


def test_what_stays_goes_to_a_folder_and_back(tmp_path) -> None:
    """A model of the usual layers is written, and read where every second MLP is another."""
    usual = spec.init(decoder.specs(BASE), random.key(1))
    save_hf(usual, tmp_path / "usual", hf_config(BASE), decoder_names(BASE))
    cfg = dataclasses.replace(BASE, pattern=(None, decoder.layer_with(BASE, mlp=bilinear())))
    specs, names = decoder.specs(cfg), decoder_names(cfg)
    fresh = spec.init(specs, random.key(2))
    loaded = load_hf(tmp_path / "usual", named(specs, names), names, unexpected="ignore")
    params = spec.put(fresh, loaded)
    spec.check(params, specs)
    known = dict(spec.leaves_with_paths(usual))
    for path, leaf in spec.leaves_with_paths(params):
        here = dict(spec.leaves_with_paths(fresh))[path] if ".mlp.w_in" in path or ".mlp.w_out" in path else known[path]
        assert torch.equal(leaf, here), path

    save_hf(named(params, names), tmp_path / "own", hf_config(BASE), names)
    back = load_hf(tmp_path / "own", named(specs, names), names)
    for (path, a), (_, b) in zip(spec.leaves_with_paths(back), spec.leaves_with_paths(loaded), strict=True):
        assert torch.equal(a, b), path
    with pytest.raises(ValueError, match=r"'layers.1.mlp.w_in_DF' has no name"):
        save_hf(params, tmp_path / "all", hf_config(BASE), names)


def test_a_block_with_a_cache_attends_in_another_block_where_ranks_share_a_sequence() -> None:
    def apply(params: dict, x_TD: torch.Tensor, at: Context) -> torch.Tensor:
        return at.attend(x_TD[:, None], x_TD[:, None], x_TD[:, None]).flatten(1)

    remembers = Cache(lambda params, x_TD, at: (x_TD, None), lambda params, x_BD, state, at: (x_BD, None))
    own = Block(lambda gain: {}, apply, remembers)
    made = language_model(dataclasses.replace(BASE, layers=2, pattern=(decoder.layer_with(BASE, attention=own),)))
    with pytest.raises(ValueError, match=r"calls at\.attend where ranks share a sequence"):
        compare(made, plan_for(made, Mesh(sequence=2, kind="virtual")), dtype=torch.float64)


def test_a_stack_can_be_deeper_or_shorter() -> None:
    cfg: DecoderConfig = dataclasses.replace(CONFIGS["mixed"], layers=6)
    assert len(decoder.specs(cfg)["layers"]) == 6
    assert tree.paths(decoder.specs(cfg)["layers"][4]) == tree.paths(decoder.specs(cfg)["layers"][0])
