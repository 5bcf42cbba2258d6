import io
import pickle

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("soundfile")

from PIL import Image as image_module

from ftrain.data.media.limits import Limits
from ftrain.data.media.reader import MediaReader
from ftrain.data.media.sizes import Multiples, Square
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Part, Place


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        image_module.fromarray(np.full((30, 40, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_files_are_found_beside_their_rows_and_decoded_once(folder):
    reader, place = MediaReader(), Place(str(folder / "chat.jsonl"), 1)
    first = reader.read(Part("image", source="1.png"), place)
    (folder / "1.png").unlink()
    assert reader.image(Part("image", source=str(folder / "1.png")), place) is first


def test_memory_stays_within_the_bytes_of_the_cache(folder):
    reader, place = MediaReader(cache_bytes=2 * 30 * 40 * 3), Place(str(folder / "chat.jsonl"), 1)
    for i in (0, 1, 2, 3, 2, 3):
        assert (reader.image(Part("image", source=f"{i}.png"), place) == i).all()
    assert reader._cache.bytes == 2 * 30 * 40 * 3
    assert pickle.loads(pickle.dumps(reader))._cache.bytes == 0


def test_pictures_get_the_size_of_the_rule(folder):
    place = Place(str(folder / "chat.jsonl"), 1)
    assert MediaReader(image_size=Square(14)).image(Part("image", source="0.png"), place).shape == (14, 14, 3)
    file = io.BytesIO()
    image_module.new("RGB", (1, 900)).save(file, "PNG")
    with pytest.raises(BadRow, match="200 times the other"):
        MediaReader(image_size=Multiples()).image(Part("image", source=file.getvalue()), place)


def test_a_text_is_no_media_and_limits_are_kept(folder):
    place = Place(str(folder / "chat.jsonl"), 1)
    with pytest.raises(BadRow, match="a part of text"):
        MediaReader().read(Part("text", "hi"), place)
    with pytest.raises(BadRow, match="1200 pixels, more than 100"):
        MediaReader(limits=Limits(pixels=100)).read(Part("image", source="0.png"), place)
