"""Qwen2.5-Omni's Token2Wav equals transformers': the loss of its flow, gradients, waves and files."""

import functools

import pytest
import torch

from ftrain.hf import load_hf
from ftrain.hf.files import HfFolder
from ftrain.modules import spec
from ftrain.modules.families import qwen2_5_omni_token2wav as family
from ftrain.modules.families import qwen2_5_omni_token2wav_files as files
from tests.helpers import talking_families as laws
from tests.helpers import talking_models
from tests.helpers.text_families import require_equal_gradients, saved

transformers = pytest.importorskip("transformers", minversion="5.24")


def configuration():
    return talking_models.qwen2_5_omni().token2wav_config


@functools.cache
def random_model(seed=0):
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavModel

    return laws.random_model(Qwen2_5OmniToken2WavModel, configuration(), seed)


def opened(model, path):
    folder = HfFolder.open(saved(model, path))
    cfg = files.config(folder.config())
    names, specs = files.names(cfg), family.specs(cfg)
    params = load_hf(folder, specs, names)
    spec.check(params, specs)
    return cfg, params, names, folder


def speech(*, clips=2, codes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    told = {
        "codes": torch.randint(0, 12, (clips, codes), generator=generator),
        "reference": torch.randn(clips, 11, 8, generator=generator),
        "voice": torch.randn(clips, 6, generator=generator),
    }
    mel, noise = (torch.randn(clips, 2 * codes, 8, generator=generator) for _ in range(2))
    return {**told, "mel": mel, "noise": noise, "time": torch.rand(clips, generator=generator)}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_flow_and_its_gradients_are_those_of_transformers(seed, tmp_path):
    model = laws.random_model(type(random_model()), configuration(), seed)
    cfg, params, names, folder = opened(model, tmp_path / "weights")
    laws.require_saved_as_it_was(params, names, folder, tmp_path / "again")
    batch = speech(codes=5 + seed, seed=seed)
    x = torch.lerp(batch["noise"], batch["mel"], batch["time"][:, None, None])
    wanted = model.code2wav_dit_model(
        hidden_states=x,
        condition_vector=batch["reference"],
        speaker_embedding=batch["voice"][:, None].expand(-1, x.shape[1], -1),
        quantized_code=batch["codes"],
        time_step=batch["time"],
        apply_cfg=False,
    )
    found = family.velocity(params["field"], x, batch["time"], batch, cfg.field)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    mean = torch.nn.functional.mse_loss(wanted, batch["mel"] - batch["noise"])
    assert abs(family.loss(params["field"], batch, cfg.field).item() - mean.item()) < 2e-5
    wave = model.code2wav_bigvgan_model(batch["mel"].mT)  # it gives waves on a CPU, squeezed
    torch.testing.assert_close(family.bigvgan.apply(params["vocoder"], batch["mel"].mT, cfg.vocoder), wave)
    (mean + wave.square().mean()).backward()

    def both(p):
        played = family.bigvgan.apply(p["vocoder"], batch["mel"].mT, cfg.vocoder)
        return family.loss(p["field"], batch, cfg.field).value() + played.square().mean()

    grads = torch.func.grad(both)(params)
    gradients = laws.gradients_of(model, tmp_path / "gradients", family.specs(cfg), names)
    require_equal_gradients(grads, gradients, within=2e-4)


def test_waves_are_those_of_transformers(tmp_path):
    model = random_model()
    cfg, params, _, _ = opened(model, tmp_path)
    told = {name: leaf for name, leaf in speech(clips=1).items() if name in ("codes", "reference", "voice")}
    torch.manual_seed(3)
    wanted = model(told["codes"], told["voice"], told["reference"], num_steps=4)
    torch.manual_seed(3)
    found = family.decode(params, told, torch.randn(1, 12, 8), cfg, steps=4)
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-4)


def test_the_published_model_is_as_large_as_transformers_builds_it():
    kind = type(random_model())
    with torch.device("meta"):
        model = kind._from_config(kind.config_class(dit_config={}, bigvgan_config={}))
    cfg = files.config({"dit_config": {}, "bigvgan_config": {}})
    assert spec.count(family.specs(cfg)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("dit_config", {"enc_channels": [8, 8, 8, 8, 20]}, "sum to the last, 20"),
        ("dit_config", {"mel_dim": 9}, "9 mel bands for a vocoder of 8"),
        ("bigvgan_config", {"resblock_dilation_sizes": [[1, 3]]}, "blocks have three dilations"),
        ("bigvgan_config", {"upsample_rates": [2]}, "must be equally many"),
        ("dit_config", {"odd": 3}, "odd=3 is not understood"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(part, changes, message):
    told = configuration().to_dict()
    with pytest.raises(ValueError, match=message):
        files.config({**told, part: {**told[part], **changes}})


def test_codes_that_are_none_are_refused(tmp_path):
    cfg, params, _, _ = opened(random_model(), tmp_path)
    told = speech(clips=1)
    with pytest.raises(ValueError, match="give codes from 0 to 12"):
        family.decode(params, {**told, "codes": told["codes"] + 13}, told["noise"], cfg)
    with pytest.raises(ValueError, match="12 frames of 5 codes"):
        family.velocity(params["field"], told["mel"], told["time"], {**told, "codes": told["codes"][:, 1:]}, cfg.field)
