"""Folders of Mimi: the library's own codec, in and out to the byte, trained in a step, codebooks as its state."""

import filecmp

import pytest
import torch

import ftrain
from ftrain.bridge.described import described
from ftrain.bridge.native_mimi import DECAY, WEIGHTS, native_mimi
from ftrain.modules import codebook_averages, spec
from ftrain.modules.families import mimi, mimi_config
from ftrain.modules.spectral_loss import SpectralConfig, spectral_terms
from ftrain.sharding import Mesh
from tests.helpers import mesh_models, tiny_mimi
from tests.helpers.tiny_mimi import OTHER, TINY, audio

transformers = pytest.importorskip("transformers")
TOLD = {**TINY, "model_type": "mimi"}


@pytest.mark.parametrize("told", [TINY, OTHER], ids=["plain", "other"])
def test_a_folder_goes_in_and_comes_out_to_the_byte(told, tmp_path):
    made = tiny_mimi.module(told)
    made.save_pretrained(tmp_path / "in")
    model = ftrain.hf.open(tmp_path / "in")
    assert model.why == "native: mimi is a family of the library"
    params = model.load()
    model.save(params, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "in").iterdir())
    assert filecmp.cmpfiles(tmp_path / "in", tmp_path / "out", files, shallow=False) == (files, [], [])
    batch = {"audio": audio(channels=told.get("audio_channels", 1))}
    assert torch.equal(model.outputs(params, batch), made.encode(batch["audio"]).audio_codes)
    again = ftrain.init(model.specs, ftrain.key(0))
    assert model.load(again) is again
    kind, specs, _ = described(tmp_path / "in")
    assert (kind, spec.count(specs)) == ("mimi", sum(p.numel() for p in made.parameters()))


def test_transformers_loads_what_a_step_has_moved(tmp_path):
    tiny_mimi.module(TINY).save_pretrained(tmp_path / "in")
    model, batch = ftrain.hf.open(tmp_path / "in"), {"audio": audio()}
    params = model.load()
    _, state = model.loss(params, batch)
    model.save(params, tmp_path / "out", state)
    theirs, told = transformers.MimiModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    codes = mimi.encode(params, state, batch["audio"], mimi_config.config(TINY))
    assert torch.equal(theirs.encode(batch["audio"]).audio_codes, codes)
    assert not torch.equal(codes, model.outputs(params, batch))


def trained(told=TOLD):
    """Recordings of two lengths, a loss of them, and the state after it."""
    model = native_mimi(told)

    def loss(params, batch):
        found, state = model.loss(params, {"audio": batch["audio"], "samples": batch["samples"]})
        return found, {"loss": found, "usage": state[mimi.ACOUSTIC]["cluster_usage_QK"]}

    def batch(packs):
        return {"audio": audio(600, recordings=2 * packs), "samples": torch.tensor([600, 550] * packs)}

    return model, mesh_models.Model(model.specs, loss, batch, {})


def test_the_loss_is_that_of_the_formula():
    model, case = trained()
    params, batch, cfg = case.params(torch.float64), case.batch(1), mimi_config.config(TINY)
    latents = mimi.latents(params, batch["audio"], cfg)
    heard, rows = torch.arange(600) < batch["samples"][:, None], {}
    counted = (torch.arange(50) < torch.tensor([50, 46])[:, None]).flatten()
    commitment, terms, moved = [], {}, {}
    for name, levels in ((mimi.SEMANTIC, 1), (mimi.ACOUSTIC, 3)):
        left = torch.einsum("bdf,zd->bfz", latents, params["quantizer"][name]["input_proj"]["weight"][..., 0])
        left = rows[name] = left.flatten(0, 1)
        books, choices = codebook_averages.books(model.state[name]).double(), []
        for level in range(levels):
            choices.append(torch.cdist(left, books[level]).argmin(1))
            left = left - books[level][choices[-1]]
            commitment.append(left[counted].square().mean(-1))
        rows[name] = rows[name] - left
        usage = torch.stack([torch.bincount(chosen[counted], minlength=8) for chosen in choices])
        moved[name] = model.state[name]["cluster_usage_QK"] * DECAY + usage * (1 - DECAY)
    made = mimi.decode_rows(params, rows, cfg, recordings=2)
    terms = {
        name: one.value()
        for name, one in spectral_terms(made, batch["audio"].double(), SpectralConfig(1200), batch["samples"]).items()
    }
    wanted = sum(terms.values()) / len(terms) + WEIGHTS["commitment"] * torch.cat(commitment).mean()
    wanted = wanted + WEIGHTS["waveform"] * (made - batch["audio"])[:, 0].abs()[heard].mean()
    found, state = model.loss(params, batch)
    torch.testing.assert_close(found.value(), wanted, rtol=1e-6, atol=0)
    for name, usage in moved.items():
        torch.testing.assert_close(state[name]["cluster_usage_QK"], usage)


@pytest.mark.exhaustive
def test_a_step_is_the_same_on_a_mesh():
    """Divided by recordings; codebooks move alike on all ranks. Logarithms of quiet bands widen the rounding."""
    _, case = trained({**TOLD, "num_hidden_layers": 1})
    plan = mesh_models.plan_for(case, Mesh(shard=2, kind="virtual"))
    value, gradients = mesh_models.compare(case, plan, dtype=torch.float64)
    assert value < 1e-9
    assert gradients < 1e-7


def test_training_brings_two_tones_back():
    """Eager: parameters by Adam, codebooks as the state of the step."""
    model = native_mimi({**TOLD, "num_hidden_layers": 1})
    tx = ftrain.optim.adamw(1e-2)
    time = torch.arange(240) / 1200
    batch = {"audio": torch.stack([(6.28 * hertz * time).sin() / 2 for hertz in (100, 230)])[:, None]}
    params = ftrain.init(model.specs, ftrain.key(0))
    moments, state, values = tx.init(params), model.state, []
    for _ in range(15):
        (value, state), grads = ftrain.value_and_grad(model.loss, has_aux=True)(params, batch, state=state)
        updates, moments = tx.update(grads, moments, params)
        params = ftrain.optim.apply_updates(params, updates)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    assert not torch.equal(state[mimi.SEMANTIC]["embed_sum_QKZ"], model.state[mimi.SEMANTIC]["embed_sum_QKZ"])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"wave": audio()}, "the batch has no 'audio'"),
        ({"audio": audio(), "x": 1}, "has 'x', which the model does not"),
        ({"audio": audio(), "samples": torch.tensor([9])}, r"give int64 \[2\], one for each recording"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, message):
    model = native_mimi(TOLD)
    with pytest.raises(ValueError, match=message):
        model.loss(ftrain.init(model.specs, ftrain.key(0)), batch)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="model_type='encodec' is no residual audio codec: mimi"):
        native_mimi({**TINY, "model_type": "encodec"})
