"""The library's own models that hear: recordings are data of a step, prompts those of processors, places right."""

import random

import pytest
import torch

import ftrain
from ftrain.modules.autoregression import generate
from ftrain.modules.families import qwen2_5_omni, qwen3_omni
from ftrain.modules.vision_media import prepare
from tests.helpers import hearing_families as laws
from tests.helpers import seeing_families as seen
from tests.helpers import tiny_thinkers

pytest.importorskip("transformers", minversion="5.24")


@pytest.fixture(scope="module")
def model():
    return laws.random_model(*tiny_thinkers.qwen2_5())


@pytest.fixture(scope="module")
def native(model, tmp_path_factory):
    return laws.opened(model, tmp_path_factory.mktemp("hearing"))


@pytest.fixture(scope="module")
def media(model):
    return qwen2_5_omni.config(model.config.to_dict()).media


def test_other_recordings_of_as_many_chunks_are_not_traced_again(native, media):
    params, seen_losses = native.load(), []
    step = ftrain.jit(lambda params, batch: native.loss(params, batch).value())
    for parts in (((2, ("sound", 50), 2, (2, 2), 3),), ((3,), (1, ("scene", 2, 2, 2, 30), 1)), ((7,),)):
        batch = native.media(seen.pack(laws.documents(media, parts), tokens=48), patches=16, chunks=4)
        seen_losses.append(step(params, batch))
        torch.testing.assert_close(seen_losses[-1], native.loss(params, batch).value(), rtol=1e-6, atol=0)
    assert step.traces == 1
    assert torch.stack(seen_losses).isfinite().all()


def test_sound_that_did_not_reach_its_tokens_gives_no_number(native, media):
    params, (one,) = native.load(), laws.documents(media, ((2, ("sound", 30), 3),))
    batch = native.media(one)
    assert native.loss(params, batch).value().isfinite()
    alone = {name: leaf for name, leaf in batch.items() if name not in ("audio", "replaced")}
    assert native.loss(params, alone).value().isnan()
    with pytest.raises(ValueError, match=r"'sound' as it came: give what model\.media"):
        native.loss(params, one)


def test_prompts_are_read_as_processors_of_transformers_give_them(native, media):
    """Recordings of several lengths, filled up to the longest of a prompt, side by side."""
    prompts = laws.documents(media, ((2, ("sound", 30), 1, ("sound", 9), 2), (1, ("sound", 44), 2)))
    given = []
    for one in prompts:
        asked = laws.asked(one)
        given.append({"tokens": one["tokens"], **{k: v for k, v in asked.items() if "feature" in k}})
    written = [generate(native.load(), some, family=native.family, max_new=4) for some in (prompts, given)]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("make", "family", "count"),
    [
        (tiny_thinkers.qwen2_5, qwen2_5_omni, 12),
        (tiny_thinkers.qwen3, qwen3_omni, 12),
        pytest.param(tiny_thinkers.qwen2_5, qwen2_5_omni, 300, marks=pytest.mark.exhaustive),
        pytest.param(tiny_thinkers.qwen3, qwen3_omni, 300, marks=pytest.mark.exhaustive),
    ],
)
def test_places_of_any_layout_are_those_of_transformers(make, family, count):
    """Videos with sound that is shorter or longer, of any rate of frames, between words, images and recordings."""
    draw = random.Random(0)
    of = laws.random_model(*make())
    cfg = family.config(of.config.to_dict()).media
    for seed in range(count):
        scenes = draw.random() < 0.7
        parts = [draw.randint(1, 4)]
        for _ in range(draw.randint(1, 4)):
            size = (2 * draw.randint(1, 4), 2 * draw.randint(1, 4))
            film = (draw.randint(1, 6), *size)
            parts.append(
                draw.choice(
                    [size, ("sound", draw.randint(4, 400)), ("scene", *film, draw.randint(4, 900)) if scenes else film]
                )
            )
            parts.append(draw.randint(1, 3))
        one = laws.document(parts, cfg, seed=seed, seconds=draw.choice([0.4, 0.5, 1.0, 2.0, 4.3]))
        wanted = laws.positions_of(of, one)
        torch.testing.assert_close(prepare(one, cfg)["positions"].double(), wanted.double(), rtol=0, atol=2e-4)
