"""`ftrain sample` writes a film and a strip of it; so does a run on its way."""

import numpy as np
import pytest
import torch

pytest.importorskip("av")

import av
from PIL import Image

import ftrain
from ftrain import lora, optim
from ftrain.bridge.native_wan import native_wan
from ftrain.bridge.pipelines import WanFolder, shift_of
from ftrain.cli.main import main
from ftrain.data.clips.cache import Cache
from ftrain.run.encoding import EncodeJob, encode
from ftrain.run.film_sampling import Sampling
from ftrain.run.film_shows import FilmShow
from ftrain.run.recipe import Recipe, optimizer
from ftrain.tasks.video import VideoFlow
from tests.helpers.tiny_wan import TINY
from tests.helpers.tiny_wan_pipeline import WITH_FRAME, write_films, write_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pipeline of one transformer in `wan`, and an adapter for it in `adapter`."""
    root = tmp_path_factory.mktemp("sample")
    write_pipeline(root / "wan", transformer={**TINY, "num_layers": 1})
    model = native_wan(root / "wan/transformer")
    adapter = lora.add(model, ["to_q", "to_v"], rank=2)
    delta = ftrain.tree.map(lambda x: x + 0.3, adapter.init(ftrain.key(0)))
    lora.save(delta, adapter, root / "adapter", task=None)
    return root


def sample(model, out, *more):
    size = ("--size", "9x32x48", "--steps", "3", "--prompt", "a square")
    return main(["sample", "--model", str(model), "--out", str(out), *size, *more])


def frames_of(file):
    with av.open(str(file)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def test_a_film_and_its_strip_are_written(root, tmp_path):
    assert sample(root / "wan", tmp_path / "a.mp4") == 0
    frames, rate = frames_of(tmp_path / "a.mp4")
    assert frames.shape == (9, 32, 48, 3)
    assert rate == 16
    strip = np.asarray(Image.open(tmp_path / "a.png"))
    assert strip.shape == (32, 8 * 48, 3)
    assert sample(root / "wan", tmp_path / "b.mp4") == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), strip)
    for name, more in {
        "adapted": ("--adapter", str(root / "adapter")),
        "euler": ("--sampler", "euler"),
        "few": ("--sampler", "few", "--times", "1", "0.5", "0", "--guidance", "1"),
        "seeded": ("--seed", "1"),
    }.items():
        assert sample(root / "wan", tmp_path / f"{name}.mp4", *more) == 0
        assert not np.array_equal(np.asarray(Image.open(tmp_path / f"{name}.png")), strip), name


def test_a_film_begins_with_a_picture(root, tmp_path, capsys):
    write_pipeline(tmp_path / "wan", transformer={**WITH_FRAME, "num_layers": 1})
    picture = np.zeros((40, 48, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "black.png")
    Image.fromarray(picture + 255).save(tmp_path / "white.png")
    for name in ("black", "white"):
        assert sample(tmp_path / "wan", tmp_path / f"{name}.mp4", "--image", str(tmp_path / f"{name}.png")) == 0
    strips = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("black", "white")]
    assert not np.array_equal(*strips)
    assert sample(tmp_path / "wan", tmp_path / "none.mp4") == 2
    assert "makes films of a first picture: give --image" in capsys.readouterr().err


def test_what_cannot_be_is_refused(root, tmp_path, capsys):
    for more, message in (
        (("--size", "8x32x48"), "frames must be 4 k + 1"),
        (("--image", "x.png"), "makes films of texts alone"),
        (("--adapter-low", "x"), "has one transformer alone"),
        (("--sampler", "few"), 'times are of the sampler "few"'),
        (("--prompt", "w" * 600), "a caption has 601 tokens, and the model reads 512"),
        (("--model", str(root)), "has no model_index.json: give the folder of a whole pipeline"),
    ):
        assert sample(root / "wan", tmp_path / "a.mp4", *more) == 2
        assert message in capsys.readouterr().err
    assert sample(root / "wan", tmp_path / "a.gif") == 2
    assert "films are written as .mp4" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_writes_films_of_its_captions_on_its_way(root, tmp_path):
    """Of the parameters as they are now, from the same noise."""
    films = write_films(tmp_path / "films", 2)
    encode(EncodeJob(root / "wan", films, tmp_path / "cache", sizes=("9x32x48",)), device=CPU, say=lambda _: None)
    cache, folder = Cache.open(tmp_path / "cache"), WanFolder.open(root / "wan")
    model = native_wan(root / "wan/transformer")
    recipe = Recipe(model, VideoFlow(), optimizer(optim.constant(1e-3), clip=1.0, weight_decay=0.0))
    show = FilmShow(
        cache.clips, cache.empty_text(), folder, folder.config(), False, Sampling(steps=2, shift=shift_of(folder)),
        tmp_path, 16.0, CPU,
    )  # fmt: skip
    state = recipe.init(ftrain.key(0))
    recipe.load(state)
    assert "films of 2 captions: " in show(recipe, state, 7)
    show(recipe, recipe.init(ftrain.key(1)), 8)
    show(recipe, state, 9)
    first, other, again = (np.asarray(Image.open(tmp_path / f"videos/step_00000{n}_0.png")) for n in (7, 8, 9))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert frames_of(tmp_path / "videos/step_000007_1.mp4")[0].shape == (9, 32, 48, 3)
