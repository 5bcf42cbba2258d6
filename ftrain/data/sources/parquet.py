"""Parquet files: a row group is decoded whole, and kept while there is room."""

from bisect import bisect_right
from itertools import accumulate
from typing import Any

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as absent:
    raise ValueError('Arrow and parquet files need pyarrow: pip install "ftrain-omni[train]"') from absent

from ftrain.data.cache import ByteCache
from ftrain.data.sample import Place
from ftrain.data.sources.arrow import row_of
from ftrain.data.sources.files import File, LocalFile
from ftrain.data.sources.source import Row, checked


class ParquetFile:
    """The rows of a parquet file. Row groups that were decoded are in `cache`, which many files may share.

    In a shuffled order each row may need another group: groups beyond the room of the cache are decoded again and
    again, so large files are better written with groups of some hundred rows, or as Arrow files.
    """

    def __init__(self, file: File, *, cache: ByteCache) -> None:
        """ValueError where the file is no whole parquet file."""
        self.file, self._cache = file, cache
        self._opened: Any = None
        meta = self._handle().metadata
        self._ends = list(accumulate(meta.row_group(i).num_rows for i in range(meta.num_row_groups)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """Row `index`. BadRow where its texts are no UTF-8, ValueError where its row group cannot be read."""
        which = bisect_right(self._ends, checked(index, len(self)))
        before = self._ends[which - 1] if which else 0
        table = self._cache.get((self.file.path, which), lambda: self._group(which), size=lambda t: t.nbytes)
        return row_of(table, index - before, Place(self.file.path, index + 1))

    def _group(self, which: int) -> Any:
        try:
            return self._handle().read_row_group(which, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"row group {which} of {self.file.path} cannot be read: {error}") from error

    def _handle(self) -> Any:
        if self._opened is None:
            local = isinstance(self.file, LocalFile)
            try:
                self._opened = pq.ParquetFile(self.file.path if local else self.file.open())
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{self.file.path} is no whole parquet file: {error}") from error
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}
