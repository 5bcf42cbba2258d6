import io
import json
import logging
import pickle
import tarfile

import numpy as np
import pytest

from ftrain.data.media.audio import read_audio
from ftrain.data.media.images import read_image
from ftrain.data.media.limits import Limits
from ftrain.data.rejects import BadRow, Rejects
from ftrain.data.sample import Chat, Prose
from ftrain.data.samples import open_samples


def test_the_format_is_found_and_told_and_broken_rows_are_counted(write, caplog):
    path = write("a.jsonl", b'{"text": "one"}\nbroken\n{"text": null}\n{"text": "four"}\n')
    with caplog.at_level(logging.INFO):
        samples = open_samples(path)
    assert caplog.records[0].getMessage() == f'{path}: 4 rows of the format text ("text")'
    rejects = Rejects(limit=1.0)
    assert [s.text for s in samples.taken(rejects)] == ["one", "four"]
    assert rejects.by_kind() == {"invalid JSON": 1, "null field": 1}
    assert [s.text for s in samples.taken(rejects, rows=[3, 0])] == ["four", "one"]


def test_samples_go_to_worker_processes(write):
    samples = pickle.loads(pickle.dumps(open_samples(write("a.jsonl", [{"instruction": "a", "output": "b"}]))))
    assert samples.format.name == "alpaca"
    assert samples[0].messages[1].text == "b"


def test_a_format_can_be_given_and_an_empty_file_is_an_error(write):
    assert open_samples(write("a.jsonl", [{"text": "x", "label": 1}]), format="text").format.name == "text"
    with pytest.raises(ValueError, match="has no rows"):
        open_samples(write("b.jsonl", "\n\n"))
    with pytest.raises(ValueError, match=r"none of the first rows of .* can be read.*row 1: no JSON"):
        open_samples(write("c.jsonl", "broken\n"))


@pytest.fixture
def picture():
    """The bytes of a PNG file of 3 x 5 pixels of one colour."""
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", (5, 3), (10, 20, 30)).save(file, "PNG")
    return file.getvalue()


def is_the_picture(sample, part):
    array = read_image(part.source, sample.place, Limits())
    return array.shape == (3, 5, 3) and (array == [10, 20, 30]).all()


def test_pictures_within_rows_of_a_tar_file_and_of_a_saved_dataset(tmp_path, picture):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.png", picture), ("1.txt", b"a cat")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = {"image": [{"bytes": picture, "path": None}], "text": ["a cat"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.tar", tmp_path / "saved"):
        samples = open_samples(path)
        assert samples.format.name == "captioned"
        assert samples[0].text == "a cat"
        assert is_the_picture(samples[0], samples[0].media)


def test_pictures_beside_the_rows_of_llava_are_found_and_missing_ones_named(tmp_path, picture):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(picture)
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    rows = [{"id": i, "image": f"images/{i}.png", "conversations": turns} for i in (1, 2)]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    samples = open_samples(tmp_path / "llava.json")
    assert samples.format.name == "llava"
    assert is_the_picture(samples[0], samples[0].messages[0].media[0])
    with pytest.raises(BadRow, match=r"llava\.json, row 2: .*images/2\.png cannot be read") as error:
        is_the_picture(samples[1], samples[1].messages[0].media[0])
    assert error.value.kind == "media missing"


def test_recordings_of_a_saved_dataset_come_at_the_rate_of_the_model(tmp_path):
    datasets, soundfile = pytest.importorskip("datasets"), pytest.importorskip("soundfile")
    datasets.disable_progress_bars()
    file = io.BytesIO()
    soundfile.write(file, np.zeros(800, np.float32), 8_000, format="WAV")
    rows = {"audio": [{"bytes": file.getvalue(), "path": None}], "transcription": ["silence"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    sample = open_samples(tmp_path / "saved")[0]
    assert len(read_audio(sample.media.source, sample.place, Limits(), rate=16_000)) == 1600


def test_rows_of_a_format_that_a_task_cannot_use_are_called_by_its_name(write):
    path = write("a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match=r"rows of the format preference .* which this task cannot use"):
        open_samples(path, kinds=(Chat, Prose))
