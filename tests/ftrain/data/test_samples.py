import logging
import pickle

import pytest

from ftrain.data.rejects import Rejects
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


def test_rows_of_a_format_that_a_task_cannot_use_are_called_by_its_name(write):
    path = write("a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match=r"rows of the format preference .* which this task cannot use"):
        open_samples(path, kinds=(Chat, Prose))
