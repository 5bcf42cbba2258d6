import io
import json
import pickle
import sys
import tarfile
from subprocess import run

import pytest

from ftrain.data.rejects import BadRow
from ftrain.data.sources.opening import open_source
from ftrain.data.sources.source import Joined

ROWS = [{"text": f"row {i}", "n": i} for i in range(7)]


def read(source):
    return [dict(source[i].fields) for i in range(len(source))]


def arrow_table():
    return pytest.importorskip("pyarrow").Table.from_pylist(ROWS)


def write_parquet(folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow_table(), folder / "a.parquet", row_group_size=3)
    return folder / "a.parquet"


def write_arrow(folder, kind):
    pa = pytest.importorskip("pyarrow")
    table = arrow_table()
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with make(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return folder / "a.arrow"


def write_lines(folder):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "a.jsonl"


def write_json(folder):
    (folder / "a.json").write_text(json.dumps(ROWS, indent=1))
    return folder / "a.json"


def write_wrapped(folder):
    (folder / "a.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    return folder / "a.json"


def write_saved(folder):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def write_saved_splits(folder):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize(
    "make",
    [
        write_lines, write_json, write_wrapped, write_parquet, lambda f: write_arrow(f, "stream"),
        lambda f: write_arrow(f, "file"), write_saved, write_saved_splits,
    ],
    ids=["jsonl", "json", "json-data", "parquet", "arrow-stream", "arrow-file", "saved", "saved-splits"],
)  # fmt: skip
def test_the_same_rows_come_from_every_kind_of_file_in_any_order_and_process(tmp_path, make):
    source = open_source(make(tmp_path))
    assert read(source) == ROWS
    assert dict(source[4].fields) == ROWS[4]
    copy = pickle.loads(pickle.dumps(source))
    assert dict(copy[5].fields) == ROWS[5]
    assert [row.fields["n"] for row in source] == list(range(7))
    with pytest.raises(IndexError):
        source[7]
    with pytest.raises(IndexError):
        source[-1]


def test_a_saved_dataset_needs_no_datasets(tmp_path):
    path = write_saved(tmp_path)
    script = (
        "import sys; sys.modules['datasets'] = None\n"
        "from ftrain.data.sources.opening import open_source\n"
        f"print(open_source({str(path)!r})[6].fields['n'])"
    )
    done = run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.stdout.strip(), done.returncode) == ("6", 0), done.stderr


def test_globs_folders_and_sequences_follow_each_other(tmp_path):
    for name, rows in (("b", ROWS[3:]), ("a", ROWS[:3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(open_source(f"{tmp_path}/*.jsonl")) == ROWS
    assert read(open_source(tmp_path)) == ROWS
    assert read(open_source([f"{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl"])) == ROWS[3:] + ROWS[:3]
    assert open_source(tmp_path)[3].place.row == 1


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_urls_of_files_globs_and_folders(tmp_path, protocol):
    fsspec = pytest.importorskip("fsspec")
    folder = f"{protocol}://{'/rows' if protocol == 'memory' else tmp_path}"
    system, path = fsspec.core.url_to_fs(folder)
    system.pipe(f"{path}/a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    for url in (f"{folder}/a.jsonl", f"{folder}/*.jsonl", folder):
        source = open_source(url)
        assert read(source) == ROWS
        assert "a.jsonl, row 3" in str(source[2].place)
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        open_source(f"{folder}/none.jsonl")


def add(tar, name, data=b"", **more):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def test_members_of_a_tar_file_with_one_key_are_a_row(tmp_path):
    members = [("s/1.jpg", b"\xff\xd8"), ("s/1.txt", "é".encode()), ("s/1.json", b'{"w": 3}'), ("s/2.cls", b"4"),
               (".hidden", b"")]  # fmt: skip
    source = open_source(write_tar(tmp_path / "a.tar", members))
    assert read(source) == [
        {"__key__": "s/1", "jpg": b"\xff\xd8", "txt": "é", "json": {"w": 3}}, {"__key__": "s/2", "cls": 4},
    ]  # fmt: skip
    assert read(pickle.loads(pickle.dumps(source))) == read(source)


def test_webdataset_reads_the_same_groups(tmp_path):
    iterators = pytest.importorskip("webdataset.tariterators")
    members = [(f"{i:03d}.{end}", f"{i}{end}".encode()) for i in range(5) for end in ("txt", "bin")]
    path = write_tar(tmp_path / "a.tar", members)
    with open(path, "rb") as stream:
        parts = iterators.tar_file_expander([{"url": str(path), "stream": stream}])
        theirs = list(iterators.group_by_keys(parts))
    ours = open_source(path)
    assert [row["__key__"] for row in theirs] == [row.fields["__key__"] for row in ours]
    assert [row["bin"] for row in theirs] == [row.fields["bin"] for row in ours]


@pytest.mark.parametrize("name", ["../a.txt", "/etc/a.txt", "a/../../b.txt", "C:a.txt"])
def test_a_tar_file_with_a_path_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="leads out"):
        open_source(write_tar(tmp_path / "a.tar", [("good.txt", b"x"), (name, b"x")]))


def test_a_tar_file_with_links_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    with pytest.raises(ValueError, match="a link or a device"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("left", [100, 600, 1536 + 100, 2 * 1536 - 10, 1536 + 512])
def test_a_tar_file_that_was_cut_off_is_an_error(tmp_path, left):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x" * 600), ("b.txt", b"y" * 600)])
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"a\.tar"):
        open_source(path)


def test_a_tar_file_with_a_broken_header_in_its_middle_is_an_error(tmp_path):
    """Python's own reader takes it for the end of the file."""
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x" * 600), ("b.txt", b"y" * 600)])
    raw = bytearray(path.read_bytes())
    raw[1536:2048] = b"?" * 512
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="its last whole member ends at byte 1536"):
        open_source(path)


def test_broken_members_are_rejects_with_their_place(tmp_path):
    source = open_source(write_tar(tmp_path / "a.tar", [("a.txt", b"\xff"), ("b.json", b"{"), ("c.txt", b"fine")]))
    for index, kind in ((0, "not UTF-8"), (1, "invalid JSON")):
        with pytest.raises(BadRow, match=rf"row {index + 1}") as error:
            source[index]
        assert error.value.kind == kind
    assert source[2].fields["txt"] == "fine"


@pytest.mark.parametrize("name", ["parquet", "arrow"])
@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.9])
def test_a_file_that_was_cut_off_is_an_error_that_names_it(tmp_path, name, keep):
    path = write_parquet(tmp_path) if name == "parquet" else write_arrow(tmp_path, "file")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=rf"a\.{name}"):
        read(open_source(path))


def test_text_in_a_column_that_is_no_utf8_is_a_reject(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"]).buffers())
    parquet.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert source[0].fields == {"text": "ok"}
    with pytest.raises(BadRow, match=r"a\.parquet, row 2"):
        source[1]


def test_parquet_groups_are_kept_within_bytes(tmp_path):
    path = write_parquet(tmp_path)
    small, large = open_source(path, cache_bytes=1), open_source(path)
    assert read(small) == read(large) == ROWS
    assert small._cache.bytes == 0
    assert large._cache.bytes > 0


def test_folders_of_texts_and_of_media_with_captions(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("b.txt", "a.md", ".hidden.txt"):
        (tmp_path / "texts" / name).write_text(name)
    assert read(open_source(tmp_path / "texts")) == [{"text": "a.md"}, {"text": "b.txt"}]
    media = tmp_path / "media"
    media.mkdir()
    for name in ("1.png", "1.txt", "2.wav", "2.caption", "3.mp4"):
        (media / name).write_text(f"of {name}\n")
    source = open_source(media)
    assert source[0].fields == {"image": str(media / "1.png"), "text": "of 1.txt"}
    assert source[1].fields == {"audio": str(media / "2.wav"), "text": "of 2.caption"}
    with pytest.raises(BadRow, match="no caption beside it"):
        source[2]


@pytest.mark.parametrize("spec", [".", "./", "./media", "media/"])
def test_folders_by_any_of_their_names(tmp_path, monkeypatch, spec):
    folder = tmp_path / ("media" if "media" in spec else ".")
    folder.mkdir(exist_ok=True)
    (folder / "metadata.csv").write_text("file_name,text\n1.png,a cat\n")
    monkeypatch.chdir(tmp_path)
    assert open_source(spec)[0].fields["text"] == "a cat"


def test_a_metadata_file_and_a_split_at_a_url(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/described/metadata.jsonl", b'{"file_name": "a/1.png", "text": "a cat"}\n')
    row = open_source("memory://described")[0]
    assert row.fields["image"].startswith("memory://")
    assert row.fields["image"].endswith("described/a/1.png")
    write_saved_splits(tmp_path)
    assert read(open_source(f"file://{tmp_path}/saved")) == ROWS


def test_media_with_a_metadata_file(tmp_path):
    rows = [{"file_name": name, "text": "x"} for name in ("a/1.png", "../1.png", "1.exe")] + [{"text": "y"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(tmp_path)
    assert source[0].fields == {"image": str(tmp_path / "a/1.png"), "text": "x"}
    for index, kind in ((1, "path escape"), (2, "unknown media"), (3, "no file name")):
        with pytest.raises(BadRow) as error:
            source[index]
        assert error.value.kind == kind


@pytest.mark.parametrize(
    ("files", "spec", "said"),
    [
        ({}, "none.jsonl", "there is no such file"),
        ({}, "*.jsonl", "no file matches"),
        ({"a.xyz": ""}, "a.xyz", "of no known kind; known are .jsonl"),
        ({"a.jsonl.gz": ""}, "a.jsonl.gz", "compressed"),
        ({"a.json": "3"}, "a.json", "not an array of rows"),
        ({"a.json": "[{"}, "a.json", "is no JSON"),
        ({"a.json": ""}, "a.json", "is empty"),
        ({"d/a.jsonl": "", "d/b.csv": ""}, "d", "data files of several kinds"),
        ({"d/a.xyz": ""}, "d", "no data files, media or texts"),
        ({"d/state.json": "{}", "d/dataset_info.json": "{}"}, "d", "names no data files"),
        ({"d/dataset_dict.json": '{"splits": ["a", "b"]}'}, "d", "holds the splits a, b: name one"),
        ({"a.tar": "no tar"}, "a.tar", "no whole, uncompressed tar"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(tmp_path, write, files, spec, said):
    for name, text in files.items():
        write(name, text)
    with pytest.raises(ValueError, match=said):
        open_source(str(tmp_path / spec))


def test_a_json_file_of_objects_a_line_is_read_as_lines(write):
    assert read(open_source(write("a.json", ROWS))) == ROWS
    assert read(open_source(write("b.json", '{"text": "one"}'))) == [{"text": "one"}]


def test_nothing_is_no_data():
    with pytest.raises(ValueError, match="no data"):
        open_source([])
    assert len(Joined([])) == 0


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (("train.jsonl", "test.jsonl"), 1),
        (("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/validation-00000.jsonl"), 2),
        (("test.jsonl", "validation.jsonl"), 2),
        (("a.jsonl", "latest.jsonl"), 2),
    ],
)
def test_of_a_folder_with_a_split_to_train_on_the_other_splits_are_left_out_and_named(tmp_path, caplog, names, read):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert len(open_source(tmp_path)) == read
    assert bool(caplog.records) == (read < len(names))
