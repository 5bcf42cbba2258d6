"""Recordings of a batch are cut into chunks, in packs and parts of them, and what does not fit is refused by name."""

import pytest
import torch

from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.pictures import MediaConfig
from ftrain.modules.sounds import SoundConfig, folded
from ftrain.modules.vision_media import prepare
from ftrain.modules.vision_tower import TowerConfig
from tests.helpers import hearing_families as laws
from tests.helpers import seeing_families as seen

EARS = AudioTowerConfig(8, layers=1, heads=2, d_hidden=8, chunk=20, mels=3, window=2, paired=True, d_out=8)
EYES = TowerConfig(8, layers=1, heads=2, d_hidden=8, d_out=8, patch=1, frames=1, channels=1)
SOUND = SoundConfig(EARS, laws.AUDIO, laws.HARK, interleave=4)
CFG = MediaConfig(EYES, seen.IMAGE, seen.VIDEO, per_second=2.0, after="max", sound=SOUND)


def raw(*parts, seed=0):
    return laws.document(parts or (2, ("sound", 47), 1, (2, 2), ("sound", 6), 1), CFG, seed=seed)


def test_every_recording_fills_chunks_of_its_own():
    given = raw()
    made = prepare(given, CFG)
    audio, tokens = made["audio"], given["tokens"]
    assert made["replaced"].tolist() == ((tokens == laws.AUDIO) | (tokens == seen.IMAGE)).tolist()
    assert audio["mel"].shape == (4, 3, 20)
    assert audio["heard"].tolist() == [20, 20, 7, 6]
    frames = torch.cat([mel[:, :heard].T for mel, heard in zip(audio["mel"], audio["heard"], strict=True)])
    assert torch.equal(frames, given["sound"])
    # windows of two chunks; behind four rows of 7 frames, and three of 6, is nothing
    assert audio["parts"].tolist() == [0] * 20 + [20] * 4 + [24] * 6 + [30] * 3 + [33] * 7
    at = (tokens == laws.AUDIO).nonzero().flatten().tolist()
    assert audio["index"].tolist() == [*at[:12], *[len(tokens)] * 3, at[12], *[len(tokens)] * 4]


def test_a_recording_is_read_as_processors_of_transformers_give_it():
    given = raw()
    asked = laws.asked(given)
    other = {name: leaf for name, leaf in given.items() if not name.startswith("sound")}
    other |= {name: asked[name] for name in ("input_features", "feature_attention_mask")}
    for name, leaf in prepare(given, CFG)["audio"].items():
        assert torch.equal(leaf, prepare(other, CFG)["audio"][name])
    assert torch.equal(folded(other, EARS)["sound"], given["sound"])


@pytest.mark.parametrize("parts", [1, 2])
def test_packs_and_parts_hold_whole_windows_of_their_own(parts):
    one, other = raw(1, ("sound", 70), 1, seed=1), raw(20, ("sound", 9), 1, seed=2)
    size = max(len(one["tokens"]), len(other["tokens"]))
    both = [seen.pack([given], tokens=size) for given in (one, other)]
    joined = {name: torch.cat([b[name] for b in both]) for name in ("tokens", "labels", "sound", "sound_frames")}
    joined["segments"] = torch.cat([both[0]["segments"], both[1]["segments"] + 7])
    audio = prepare(joined, CFG, chunks=4, packs=2, parts=parts)["audio"]
    assert audio["heard"].tolist() == [20, 20, 20, 10, 9, 0, 0, 0]
    rows = 8 // (2 * parts) * EARS.rows
    for part, ids in enumerate(audio["parts"].split(rows)):
        assert ((ids >= part * rows) & (ids < (part + 1) * rows)).all()
    for pack, index in enumerate(audio["index"].chunk(2)):
        assert (index[index < 2 * size] // size == pack).all()
    with pytest.raises(ValueError, match=r"recordings of 4 chunks, in windows of up to 2, .* chunks=2 in 1 parts"):
        prepare(joined, CFG, chunks=2, packs=2)


def test_text_alone_has_no_sound_unless_there_is_a_budget():
    assert "audio" not in prepare(raw(5), CFG)
    audio = prepare(raw(5), CFG, chunks=2)["audio"]
    assert audio["heard"].tolist() == [0, 0]
    assert audio["index"].tolist() == [5] * 10


def changed(**leaves):
    return {**raw(), **leaves}


def without(*names):
    return {name: leaf for name, leaf in raw().items() if name not in names}


FEATURES = {"input_features": torch.ones(1, 3, 8), "feature_attention_mask": torch.tensor([[0, *[1] * 7]])}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(tokens=raw()["tokens"][5:]), r"has 11 tokens of sound \(id 64\), and its 2 recordings have 13"),
        (changed(sound_frames=torch.tensor([53])), "13 tokens of one recording that begin at token 3 do not stand"),
        (changed(sound_frames=torch.tensor([47, 5])), r"\[47, 5\] are not the lengths of 53 frames"),
        (changed(sound_frames=torch.tensor([52, 1])), "recording 1 has 1 frames, too few for a token"),
        (changed(sound_frames=torch.tensor([53, 0])), "recording 1 has 0 frames, too few for a token"),
        (changed(sound=torch.ones(53, 4)), "give frames of 3 bands"),
        (changed(sound=torch.ones(53, 3, dtype=torch.int64)), "recordings are torch.int64: give log-mel frames"),
        (changed(sound=torch.full((53, 3), torch.nan)), r"recording 0 has a frame of no finite number \(frame 0"),
        (without("sound"), "'sound_frames' and no 'sound'"),
        (changed(**FEATURES), "'sound' and 'input_features', two names"),
        ({**without("sound", "sound_frames"), **FEATURES}, "silence before sound"),
        ({**without("sound", "sound_frames"), **FEATURES, "input_features": torch.ones(1, 2, 8)}, "of 3 bands"),
        (changed(segments=torch.tensor([0] * 6 + [1] * (len(raw()["tokens"]) - 6))), "recording .* two documents"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        prepare(given, CFG)


def test_videos_tell_how_long_their_frames_are_and_scenes_have_sound():
    silent = raw(2, (2, 2, 2), 2)
    untimed = {name: leaf for name, leaf in silent.items() if name != "video_second_per_grid"}
    with pytest.raises(ValueError, match="1 videos and no 'video_second_per_grid'"):
        prepare(untimed, CFG)
    tokens = torch.where(silent["tokens"] == seen.START, laws.HARK, silent["tokens"])
    with pytest.raises(
        ValueError, match="video at token 3 stands where its sound is to be mixed with it, and has none"
    ):
        prepare({**silent, "tokens": tokens}, CFG)
