"""`ftrain encode`: what a video transformer reads, made once; a killed run goes on, and several share the work."""

import filecmp
from dataclasses import replace

import pytest
import torch

pytest.importorskip("av")

import ftrain
from ftrain.data.clips.cache import Cache, read_clip
from ftrain.data.media.film_frames import frames_at
from ftrain.data.media.limits import Limits
from ftrain.data.sample import Place
from ftrain.run.encoding import EncodeJob, encode
from tests.helpers.tiny_wan_pipeline import WITH_ENCODER, write_film, write_films, write_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pipeline in `wan`, films in `films`: three of 12 frames of 32 x 48, and one that is long and tall."""
    root = tmp_path_factory.mktemp("encode")
    write_pipeline(root / "wan", transformer=WITH_ENCODER)
    write_films(root / "films", 3)
    write_film(root / "films/long.mkv", frames=34, size=(64, 40), seed=3)
    (root / "films/long.txt").write_text("long  &amp; tall")
    return root


def job(root, out, **more):
    made = EncodeJob(
        root / "wan", root / "films", out, sizes=("9x32x48", "5x32x48", "9x48x32"), shard=2, dtype=torch.float32
    )
    return replace(made, **more)


@pytest.fixture(scope="module")
def cache(root):
    """The cache of all films."""
    assert encode(job(root, root / "cache"), device=CPU) == 4
    return Cache.open(root / "cache")


def test_clips_are_what_the_encoders_make_of_frames_and_captions(root, cache):
    assert [clip.size for clip in cache.clips] == [(9, 32, 48)] * 3 + [(9, 48, 32)]
    clip = cache.clips[1]
    held = read_clip(clip)
    frames = frames_at(clip.video, Place("", 1), Limits(), list(range(9)))
    video = (torch.from_numpy(frames).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
    vae = ftrain.hf.open(root / "wan/vae")
    params = vae.load()
    torch.testing.assert_close(held["latents"], vae.hidden(params, {"video": video})[0], atol=1e-5, rtol=1e-5)
    alone = torch.cat([video[:, :, :1], torch.zeros_like(video[:, :, 1:])], 2)
    torch.testing.assert_close(held["condition"], vae.hidden(params, {"video": alone})[0], atol=1e-5, rtol=1e-5)
    assert held["image"].shape == (5, 10)
    text = ftrain.hf.open(root / "wan/text_encoder")
    letters = "a square that moves, number 1"
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(root / "wan/tokenizer")(letters)["input_ids"]
    assert len(ids) == len(letters) + 1
    wanted = text.hidden(text.load(), {"tokens": torch.tensor(ids)})
    torch.testing.assert_close(held["text"], wanted, atol=1e-5, rtol=1e-5)
    assert len(read_clip(cache.clips[3])["text"]) == len("long & tall") + 1  # cleaned
    assert len(cache.empty_text()) == 1


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_killed_run_goes_on_and_parts_make_the_same_files(root, cache, tmp_path):
    """What was being written lies under another name, and is written over."""

    def stop(words):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(job(root, tmp_path / "killed"), device=CPU, say=stop)
    (tmp_path / "killed/shards/.00001.safetensors.part").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"has 1 of 2 shards: the same `ftrain encode` command makes the others"):
        Cache.open(tmp_path / "killed")
    assert encode(job(root, tmp_path / "killed"), device=CPU) == 2
    for part in (1, 0):
        assert encode(job(root, tmp_path / "parts"), device=CPU, part=part, parts=2) == 2
    for other in ("killed", "parts"):
        names = files_of(cache.folder)
        assert files_of(tmp_path / other) == names
        assert filecmp.cmpfiles(cache.folder, tmp_path / other, names, shallow=False) == (names, [], [])
    assert encode(job(root, tmp_path / "parts"), device=CPU) == 0


def test_all_clips_of_a_long_video_and_other_ways_to_its_size(root, tmp_path):
    assert encode(job(root, tmp_path, cut="all", resize="stretch", sizes=("9x64x48",)), device=CPU) == 3 + 3
    found = Cache.open(tmp_path)
    assert [clip.key for clip in found.clips] == ["0.0", "1.0", "2.0", "3.0", "3.1", "3.2"]
    assert found.clips[-1].latents == (4, 3, 8, 6)


def test_another_encoder_or_way_is_refused_by_name(root, cache, tmp_path):
    write_pipeline(tmp_path / "wan", transformer=WITH_ENCODER, seed=1)
    with pytest.raises(ValueError, match=r"text_encoder = that of .*/encode0/wan/text_encoder \(weights \w{8}\), and"):
        encode(job(root, cache.folder, model=tmp_path / "wan"), device=CPU)
    with pytest.raises(ValueError, match=r"was made with fps = 16.0, and these options say 8.0: give the same"):
        encode(job(root, cache.folder, fps=8.0), device=CPU)
    moved = tmp_path / "moved"
    (root / "wan").rename(moved)
    try:
        assert encode(job(root, cache.folder, model=moved), device=CPU) == 0
    finally:
        moved.rename(root / "wan")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (("8x32x48",), "8x32x48: frames must be 4 k \\+ 1, and height and width multiples of 16: 5x32x48 would do"),
        (("9x40x48",), "9x40x48: .* 9x32x48 would do"),
        (("9-32",), "write frames x height x width, such as 81x480x832"),
        (("9x32x48", "9x32x48"), "is there twice"),
    ],
)
def test_sizes_that_the_model_cannot_take_are_refused(root, tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        encode(job(root, tmp_path, sizes=sizes), device=CPU)


def test_videos_that_cannot_be_used_are_left_out_and_too_many_end_it(root, tmp_path):
    films = write_films(tmp_path / "films", 1)
    write_film(films / "short.mkv", frames=4)
    write_film(films / "slow.mkv", frames=12, rate=8)
    write_film(films / "worded.mkv")
    (films / "broken.mp4").write_bytes(b"no film")
    for name in ("short", "slow", "worded", "broken"):
        (films / f"{name}.txt").write_text("word " * (150 if name == "worded" else 1))
    encode(job(root, tmp_path / "cache", videos=films, rejected=0.9), device=CPU)
    found = Cache.open(tmp_path / "cache")
    assert len(found) == 1
    told = dict(line.split(": ", 1) for line in found.left_out)
    told = {name.rpartition("/")[2]: words for name, words in told.items()}
    assert "no whole film" in told["broken.mp4"]
    assert told["short.mkv"] == "it has 4 frames at this rate, and the shortest size asks 5"
    assert told["slow.mkv"].startswith("it has 8 frames a second, fewer than --fps 16")
    assert told["worded.mkv"].startswith("a caption has 750 tokens, and the model reads 512: shorten it")
    for _ in range(2):  # also where nothing is left to encode
        with pytest.raises(ValueError, match=r"4 of 5 videos cannot be used, more than --rejected 0.05 of them"):
            encode(job(root, tmp_path / "strict", videos=films, rejected=0.05), device=CPU)


def test_own_sizes_are_kept_and_odd_ones_left_out(root, tmp_path):
    """Without sizes nothing is cut: 12 frames are no 4 k + 1."""
    with pytest.raises(ValueError, match=r"12x32x48: .* 9x32x48 would do; or give --sizes"):
        encode(job(root, tmp_path / "a", sizes=()), device=CPU)
    films = write_films(tmp_path / "films", 1, frames=13)
    assert encode(job(root, tmp_path / "b", sizes=(), videos=films), device=CPU) == 1
