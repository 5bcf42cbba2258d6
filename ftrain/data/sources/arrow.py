"""Arrow files, of the stream and of the file format: mapped into memory, so that a row costs no reading of others."""

from bisect import bisect_right
from itertools import accumulate
from typing import Any

try:
    import pyarrow as pa
except ImportError as absent:
    raise ValueError('Arrow and parquet files need pyarrow: pip install "ftrain-omni[train]"') from absent

from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place
from ftrain.data.sources.files import File, LocalFile
from ftrain.data.sources.source import Row, checked


class ArrowFile:
    """The rows of an Arrow file, as `datasets` writes them or `pyarrow.ipc`."""

    def __init__(self, file: File) -> None:
        """ValueError where the file is no whole Arrow file."""
        self.file = file
        self._open()

    def _open(self) -> None:
        try:
            self._batches = _batches(self.file)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise ValueError(f"{self.file.path} is no whole Arrow file: {error}") from error
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """Row `index`. BadRow where a text in it is no UTF-8."""
        which = bisect_right(self._ends, checked(index, len(self)))
        before = self._ends[which - 1] if which else 0
        return row_of(self._batches[which], index - before, Place(self.file.path, index + 1))

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.file = state["file"]
        self._open()


def _batches(file: File) -> list[Any]:
    mapped = pa.memory_map(file.path) if isinstance(file, LocalFile) else pa.PythonFile(file.open(), mode="r")
    try:
        with_footer = pa.ipc.open_file(mapped)
    except pa.ArrowInvalid:
        mapped.seek(0)
        return list(pa.ipc.open_stream(mapped))
    return [with_footer.get_batch(i) for i in range(with_footer.num_record_batches)]


def row_of(table: Any, index: int, place: Place) -> Row:
    """A row of a table or a batch of pyarrow, as Python objects. BadRow where it cannot be made of its bytes."""
    try:
        (fields,) = table.slice(index, 1).to_pylist()
    except (UnicodeDecodeError, pa.ArrowException, ValueError) as error:
        raise BadRow(place, "unreadable fields", f"its fields cannot be read: {error}") from error
    return Row(fields, place)
