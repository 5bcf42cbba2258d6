"""What is opened below a folder lies there, is a regular file, and is no larger than it may be."""

import os
import socket

import pytest

from ftrain.files.beneath import Folder, NotPlain, read_file


@pytest.fixture
def place(tmp_path):
    """A folder with a file two levels down; beside it a secret."""
    (tmp_path / "secret").write_text("key")
    inner = tmp_path / "here" / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "file").write_text("content")
    return tmp_path / "here"


def test_a_file_is_read_by_its_name(place):
    with Folder(place) as folder:
        assert folder.read("a/b/file", limit=7) == b"content"
        assert folder.size("a/b/file") == 7
        folder.require_plain("a")
        with pytest.raises(FileNotFoundError):
            folder.read("a/other", limit=7)


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../secret", "a/../../secret", "a//b/file", "./a/b/file", "a/b/\0"]
)
def test_a_name_that_leads_elsewhere(place, name):
    with Folder(place) as folder, pytest.raises(NotPlain, match="is no name of a file below"):
        folder.read(name, limit=100)


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    os.chdir(path.parent)  # the name of a socket is at most 108 characters long
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.symlink_to("../../../secret"), "a link"),
        (lambda path: path.symlink_to("file"), "a link"),
        (lambda path: path.symlink_to("/dev/zero"), "a link"),
        (make_pipe, "a pipe"),
        (make_socket, "a socket"),
        (lambda path: path.mkdir(), "a folder"),
    ],
    ids=["link out", "link within", "link to a device", "pipe", "socket", "folder"],
)
def test_what_is_no_regular_file_is_refused_at_once(place, monkeypatch, make, kind):
    monkeypatch.chdir(place)
    make(place / "a" / "b" / "odd")
    with Folder(place) as folder:
        with pytest.raises(NotPlain, match=f"odd is {kind}, not a regular file"):
            folder.read("a/b/odd", limit=100)
        if kind != "a folder":
            with pytest.raises(NotPlain, match=f"odd is {kind}, not a regular file"):
                folder.require_plain("a")


def test_a_link_on_the_way_is_not_followed(place):
    (place / "a" / "way").symlink_to("b")
    with Folder(place) as folder, pytest.raises(NotPlain, match="a/way is a link, not a folder"):
        folder.read("a/way/file", limit=100)


def test_a_file_that_is_too_large_is_not_read(place):
    with open(place / "sparse", "wb") as file:
        file.truncate(2**40)
    with Folder(place) as folder, pytest.raises(NotPlain, match="sparse has 1,099,511,627,776 bytes, and may have 64"):
        folder.read("sparse", limit=64)


def test_a_file_that_the_caller_names_may_be_a_link_but_no_pipe(place):
    (place / "link").symlink_to("a/b/file")
    assert read_file(place / "link", limit=7) == b"content"
    make_pipe(place / "pipe")
    with pytest.raises(NotPlain, match="pipe is a pipe, not a regular file"):
        read_file(place / "pipe", limit=7)


def test_a_folder_that_is_held_stays_when_its_name_goes_to_another(place):
    with Folder(place) as folder:
        assert folder.is_still(place)
        place.rename(place.with_name("old"))
        (place / "a" / "b").mkdir(parents=True)
        (place / "a" / "b" / "file").write_text("another")
        assert not folder.is_still(place)
        assert folder.read("a/b/file", limit=7) == b"content"


def test_descriptors_are_given_back(place):
    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        with Folder(place) as folder:
            folder.read("a/b/file", limit=7)
            for name in ("a/b/none", "a/none/file", "a/b", "../secret"):
                with pytest.raises((OSError, NotPlain)):
                    folder.read(name, limit=7)
        Folder(place)  # forgotten
    assert count() == before
