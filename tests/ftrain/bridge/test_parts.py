"""Parts of published folders compute in a composed model what they do where they come from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu

import ftrain
from ftrain.bridge.parts import foundation_part, picture_part, sound_part, tokenizer_part
from ftrain.modules import decoder, linear, omni, tower_encoders, vq_image
from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Text, exact_budget, pack
from ftrain.modules.vision_tower import TowerConfig
from tests.helpers import part_folders

transformers = pytest.importorskip("transformers", minversion="5.24")
MARKS = {"begin": 5, "end": 6}
AS_IT_IS = {"do_resize": False, "do_rescale": False, "do_normalize": False, "input_data_format": "channels_last"}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_foundation(kind, tmp_path):
    model = part_folders.foundation(kind, tmp_path, words=[f"w{i}" for i in range(20)])
    part = foundation_part(tmp_path)
    ids = torch.randint(0, 20, (9,), generator=torch.Generator().manual_seed(1))
    places = {"positions": torch.arange(9), "segments": torch.zeros(9, dtype=torch.int64)}
    params = part.load()
    hidden_TD, _ = decoder.apply(params, decoder.embed(params, ids), cfg=part.cfg, **places)
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    torch.testing.assert_close(decoder.logits(params, hidden_TD, part.cfg), wanted, rtol=1e-4, atol=2e-5)


def composed(encoder, tower):
    """A model with this encoder, whose tower has these parameters."""
    model = OmniModel(decoder.preset("llama-tiny"), {"read": encoder})
    params = ftrain.init(omni.specs(model), ftrain.key(0))
    params["encoders"]["read"]["tower"] = tower
    return model, params


def rows_read(model, params, items):
    """The rows of these items in the order in which the foundation reads them, beside others and padding."""
    documents = [[Text([1]), item, Text([2])] for item in items]
    least = exact_budget(documents, model=model)
    budget = replace(least, tokens=least.tokens + 3, rows={"read": least.rows["read"] * 2})
    batch = pack(documents, budget=budget, model=model).batch
    found = omni.media_rows(params, batch, model=model)
    whole_TD = omni.merge(torch.full((budget.tokens, 64), float("nan")), found.rows, found.places)
    of_T = batch["segments_T"].ids_T
    rows = [whole_TD[of_T == i] for i in range(len(items))]
    return {len(own) - 4: own[2:-2] for own in rows}


def projected(params, rows):
    own = params["encoders"]["read"]["projector"]
    return linear.apply(own["down"], gelu(linear.apply(own["up"], rows)))


def test_a_tower_of_pictures_with_windows(tmp_path):
    """Pictures of several sizes side by side and a film, in the order of their rows."""
    theirs = part_folders.pictures(tmp_path).model.visual
    part = picture_part(tmp_path)
    assert part.cfg.window == 2
    model, params = composed(tower_encoders.seeing(part.cfg, 64, **MARKS), part.load())
    processor = transformers.Qwen2VLImageProcessorPil(patch_size=2, merge_size=2, temporal_patch_size=2)
    generator = np.random.default_rng(0)
    shapes = [(8, 20, 3), (12, 12, 3), (4, 4, 3), (4, 8, 12, 3)]
    items = [generator.integers(0, 255, shape).astype(np.uint8) for shape in shapes]
    found = rows_read(model, params, [tower_encoders.seen("read", item / 255 - 0.5, part.cfg) for item in items])
    for item in items:
        film = item if item.ndim == 4 else np.repeat(item[None], 2, 0)
        for first in range(0, len(film), 2):
            # transformers' processor takes pictures of one frame; both frames of a film's pair are looked at
            pixels, grids = [], None
            for frame in film[first : first + 2]:
                out = processor([frame], **AS_IT_IS, return_tensors="pt")
                pixels.append(out["pixel_values"].float().unflatten(1, (3, 2, 4))[:, :, :1])
                grids = out["image_grid_thw"]
            given = torch.cat(pixels, 2).flatten(1) / 255 - 0.5
            with torch.no_grad():
                rows = theirs(given, grids)
            rows = getattr(rows, "pooler_output", rows)
            own = found[len(rows) * len(film) // 2][first // 2 * len(rows) :][: len(rows)]
            torch.testing.assert_close(own, projected(params, rows), rtol=1e-4, atol=2e-5)


def test_whispers_encoder(tmp_path):
    """Waves longer and shorter than a window, as Whisper's feature extractor gives them; silence behind is not read."""
    theirs = part_folders.sounds(tmp_path).model.encoder
    part = sound_part(tmp_path)
    model, params = composed(tower_encoders.hearing(part.cfg, 64, merge=5, **MARKS), part.load())
    extractor = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=1)
    generator = np.random.default_rng(0)
    waves = [generator.normal(size=n).astype(np.float32) * 0.1 for n in (9_000, 16_000, 20_000)]
    found = rows_read(model, params, [tower_encoders.heard("read", wave, part.cfg, merge=5) for wave in waves])
    assert sorted(found) == [6, 10, 13]
    for wave, tokens in zip(waves, (6, 10, 13), strict=True):
        windows = [wave[i : i + 16_000] for i in range(0, len(wave), 16_000)]
        mel = extractor(windows, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            rows = theirs(mel).last_hidden_state.flatten(0, 1)
        wanted = projected(params, rows.unflatten(0, (-1, 5)).flatten(1))[:tokens]
        torch.testing.assert_close(found[tokens], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm_type", ["spatial", "group"])
def test_a_tokenizer_of_pictures(norm_type, tmp_path):
    pytest.importorskip("diffusers")
    model = part_folders.tokenizer(tmp_path, norm_type=norm_type)
    part = tokenizer_part(tmp_path, grid=4)
    params = part.load()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        latents = model.encode(images).latents
        back, _ = model.decode(latents, return_dict=False)
        wanted = model.quantize(model.quant_conv(model.encoder(images)))[2][2]
    codes = vq_image.encode(params, images, cfg=part.cfg)
    torch.testing.assert_close(vq_image.latent_grid(params, images, cfg=part.cfg), latents, rtol=0, atol=2e-5)
    torch.testing.assert_close(codes.flatten(), wanted.flatten())
    torch.testing.assert_close(vq_image.decode(params, codes, cfg=part.cfg), back, rtol=0, atol=2e-5)


def test_folders_of_other_models_are_refused(tmp_path):
    part_folders.sounds(tmp_path / "sounds")
    part_folders.foundation("llama", tmp_path / "text", words=["?"])
    with pytest.raises(ValueError, match="'whisper' is of no family with a tower of pictures"):
        picture_part(tmp_path / "sounds")
    with pytest.raises(ValueError, match="'llama' is not 'whisper'"):
        sound_part(tmp_path / "text")
    with pytest.raises(ValueError, match="diffusion_pytorch_model"):
        tokenizer_part(tmp_path / "text", grid=4)


EYE = TowerConfig(16, layers=1, heads=2, d_hidden=8, d_out=8, patch=2, channels=1)
EAR = AudioTowerConfig(8, layers=1, heads=2, d_hidden=8, chunk=20, mels=4, table=True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: tower_encoders.seeing(replace(EYE, deep_layers=(0,)), 8, **MARKS),
            r"deep_layers=\(0,\) and side=None",
        ),
        (lambda: tower_encoders.seeing(replace(EYE, side=4), 8, **MARKS), "side=4 cannot be an encoder"),
        (lambda: tower_encoders.seen("read", np.zeros((4, 6, 1)), EYE), r"\[4, 6, 1\].* H and W multiples of 4"),
        (lambda: tower_encoders.seen("read", np.zeros((4, 4, 3)), EYE), r"takes \[H, W, 1\]"),
        (lambda: tower_encoders.seen("read", np.zeros((3, 4, 4, 1)), EYE), "S a multiple of 2"),
        (lambda: tower_encoders.seen("read", np.zeros((4, 4, 1), np.uint8), EYE), "a picture of uint8"),
        (lambda: tower_encoders.hearing(EAR, 8, merge=4, **MARKS), "merge=4 does not divide the 10 rows"),
        (lambda: tower_encoders.hearing(replace(EAR, paired=True), 8, merge=2, **MARKS), "rows that are not paired"),
        (lambda: tower_encoders.heard("read", np.zeros(0), EAR, merge=2), "no samples"),
        (lambda: tower_encoders.heard("read", np.zeros(9, np.int16), EAR, merge=2), "a wave of int16"),
    ],
)
def test_what_towers_cannot_take_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
