import csv
import io
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.data.rejects import BadRow
from ftrain.data.sources import lines
from ftrain.data.sources.files import LocalFile
from ftrain.data.sources.lines import Csv, JsonLines, LineIndex


def test_rows_are_read_in_any_order_and_know_their_lines(write):
    path = write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": "\xc3\xa9"}\r\n{"a": 3}')
    rows = JsonLines(LocalFile(path))
    assert [(rows[i].fields["a"], rows[i].place.row) for i in (2, 0, 1)] == [(3, 5), (1, 1), ("é", 4)]
    assert pickle.loads(pickle.dumps(rows))[2].fields == {"a": 3}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"a": 1', "invalid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1]", "no JSON object"),
        (b"[" * 100_000, "invalid JSON"),
    ],
)
def test_a_broken_line_is_a_named_reject_and_the_others_are_read(write, line, kind):
    path = write("a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    rows = JsonLines(LocalFile(path))
    with pytest.raises(BadRow, match=r"a\.jsonl, row 2: ") as error:
        rows[1]
    assert error.value.kind == kind
    assert rows[2].fields == {"a": 3}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=30), st.integers(1, 40))
def test_the_index_is_that_of_splitting_whatever_the_pieces_it_is_read_in(tmp_path_factory, parts, chunk):
    path = tmp_path_factory.getbasetemp() / "index.bin"
    path.write_bytes(b"\n".join(parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_CHUNK", chunk)
        index = LineIndex.of(LocalFile(str(path)))
    whole = path.read_bytes()
    found = [(whole[s:e], line) for s, e, line in zip(index.starts, index.ends, index.lines, strict=True)]
    assert found == [(part, i + 1) for i, part in enumerate(parts) if part]


fields = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(fields, fields), min_size=1, max_size=12), st.integers(1, 30))
def test_csv_is_read_as_the_standard_library_writes_it(tmp_path_factory, rows, chunk):
    path = tmp_path_factory.getbasetemp() / "a.csv"
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("x", "y"), *rows])
    path.write_bytes(text.getvalue().encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_CHUNK", chunk)
        source = Csv(LocalFile(str(path)))
    assert [tuple(source[i].fields.values()) for i in range(len(source))] == rows


def test_long_values_tabs_and_rows_of_another_width(write):
    long = "x" * 300_000
    source = Csv(LocalFile(write("a.tsv", f'a\tb\r\n1\t"{long}"\r\n1\t2\t3\r\n"un"closed\t2\n')), delimiter="\t")
    assert source[0].fields == {"a": "1", "b": long}
    with pytest.raises(BadRow, match="3 values for the 2 columns a, b"):
        source[1]
    with pytest.raises(BadRow, match="no row of CSV"):
        source[2]


@pytest.mark.parametrize(("text", "said"), [("", "is empty"), ("a,a\n1,2\n", "names a column twice")])
def test_a_csv_file_without_names_is_an_error(write, text, said):
    with pytest.raises(ValueError, match=said):
        Csv(LocalFile(write("a.csv", text)))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(write):
    path = write("a.jsonl", [{"a": 1}, {"a": 2}])
    rows = JsonLines(LocalFile(path))
    write("a.jsonl", json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="became shorter"):
        rows[1]
