"""The objects of a bucket: names below a prefix, contents, and answers that are read until they agree."""

import pytest

from ftrain.checkpoint import objects as objects_module
from ftrain.checkpoint.objects import Objects


@pytest.fixture(params=["memory", "s3"])
def objects(request):
    if request.param == "memory":
        return Objects("memory://run/a", {})
    return Objects("s3://runs/objects/a", request.getfixturevalue("s3"))


def test_an_object_is_put_listed_read_and_deleted(objects):
    for name in ("f/2", "f/1", "g/1"):
        objects.put(name, name.encode())
    assert objects.names("f/") == ["f/1", "f/2"]
    assert objects.contents(["f/2", "f/3"]) == [b"f/2", None]
    objects.put("f/2", b"new")
    assert objects.get("f/2") == b"new"
    objects.delete([*objects.names("f/"), "f/3"])
    assert [objects.names("f/"), objects.names("g/")] == [[], ["g/1"]]
    objects.delete(["g/1"])


def test_a_folder_is_where_tensorstore_finds_it(objects):
    assert objects.kvstore("f")["path"].endswith("a/f/")
    assert objects.show("f/1").endswith("a/f/1")


def test_what_was_written_settles_and_what_was_not_is_named(monkeypatch):
    objects = Objects("memory://run", {})
    monkeypatch.setattr(objects_module.time, "sleep", lambda seconds: None)
    objects.put("a", b"1")
    assert objects.settled(["a", "a"]) == [b"1", b"1"]
    assert objects.settled([]) == []
    with pytest.raises(OSError, match=r"memory://run/b was written, but is missing or differs at each reading"):
        objects.settled(["a", "b"])


def test_a_server_of_one_s_own_is_found_in_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    spec = Objects("s3://bucket/run", {}).kvstore("")
    assert spec == {
        "driver": "s3", "bucket": "bucket", "path": "run/", "endpoint": "http://127.0.0.1:9", "aws_region": "us-east-1",
    }  # fmt: skip
    assert Objects("s3://bucket/run", {"aws_region": "eu-west-1"}).kvstore("")["aws_region"] == "eu-west-1"
