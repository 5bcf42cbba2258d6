"""Which videos a folder has with which captions, and which size a video gets."""

import numpy as np
import pytest

from ftrain.data.clips.captions import videos_of
from ftrain.data.clips.sizes import Grid, Size, chosen, fitted, sizes_of
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place

PLACE = Place("a.mp4", 1)


def test_captions_are_in_a_list_or_beside_the_videos(tmp_path):
    for name in ("a.mp4", "sub/b.webm", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.mp4 has no a.txt beside it"):
        videos_of(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub/b.txt").write_text("two")
    assert [(v.path.name, v.caption) for v in videos_of(tmp_path)] == [("a.mp4", "one"), ("b.webm", "two")]
    (tmp_path / "captions.csv").write_text('file_name,text\nsub/b.webm,"two, three"\n')
    assert [(v.path.name, v.caption, v.place.row) for v in videos_of(tmp_path)] == [("b.webm", "two, three", 2)]
    other = tmp_path / "other.jsonl"
    other.write_text('{"video": "a.mp4", "caption": "four"}\n\n{"video": "gone.mp4", "caption": "five"}\n')
    with pytest.raises(ValueError, match=r"other.jsonl, row 3: .*gone.mp4 is missing"):
        videos_of(tmp_path, other)
    other.write_text('{"video": "a.mp4", "caption": "six\u2028seven\x85"}\n', encoding="utf-8")
    assert [v.caption for v in videos_of(tmp_path, other)] == ["six\u2028seven\x85"]
    other.write_text('{"video": "a.mp4"}\n')
    with pytest.raises(ValueError, match=r"row 1: a row needs one of file_name, .* and one of text, caption, prompt"):
        videos_of(tmp_path, other)
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"has captions.csv and metadata.jsonl: say which"):
        videos_of(tmp_path)


def test_a_video_gets_the_longest_size_of_its_shape():
    sizes = sizes_of(["17x64x96", "17x32x48", "5x64x96", "17x96x64"], Grid(4, 16))
    pick = lambda **of: chosen(sizes, place=PLACE, **of)  # noqa: E731
    assert pick(frames=20, height=720, width=1280) == Size(17, 64, 96)
    assert pick(frames=20, height=40, width=60) == Size(17, 32, 48)  # nothing is made larger where it need not be
    assert pick(frames=16, height=720, width=1280) == Size(5, 64, 96)
    assert pick(frames=20, height=1280, width=720) == Size(17, 96, 64)
    with pytest.raises(BadRow, match="it has 4 frames at this rate, and the shortest size asks 5"):
        pick(frames=4, height=9, width=9)


@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_a_crop_keeps_the_shape_of_things_and_a_stretch_keeps_the_edges(resize):
    """A video twice as wide as its size: left and right quarters are red."""
    frames = np.zeros((5, 32, 128, 3), np.uint8)
    frames[:, :, :32, 0] = frames[:, :, 96:, 0] = 255
    found = fitted(frames, Size(5, 32, 64), resize=resize, place=PLACE)
    assert found.shape == (3, 5, 32, 64)
    red = ((found[0, 0, 0] + 1) / 2).round().tolist()
    assert red == ([0.0] * 64 if resize == "crop" else [1.0] * 16 + [0.0] * 32 + [1.0] * 16)


def test_another_size_is_refused_where_that_was_asked():
    frames = np.full((5, 32, 48, 3), 255, np.uint8)
    assert fitted(frames, Size(5, 32, 48), resize="refuse", place=PLACE).eq(1).all()
    with pytest.raises(BadRow, match="it is 5x32x48, not 5x32x64: take --resize crop or stretch"):
        fitted(frames, Size(5, 32, 64), resize="refuse", place=PLACE)
