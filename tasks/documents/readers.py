"""Readers: alone responsible for reading ranges of rows of a Parquet file without holding much of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.documents.places import Place

_BUFFER = 256 * 1024  # bytes read at once per column
_BATCH_BYTES = 2 * 1024 * 1024  # of one batch, by the footer's sizes
_BATCH_ROWS = 256  # at most: a dictionary page hides how large its rows are


def open_reader(place: Place, path: str, columns: Sequence[str]) -> Reader:
    """A reader of these columns; one that is named twice is read once."""
    return Reader(place.filesystem.open_input_file(path), list(dict.fromkeys(columns)))


class Reader:
    """Reads row ranges of one Parquet file, a few rows at a time.

    It remembers where it is: going on in a row group costs nothing, while going back, or into the middle of
    another one, decodes that row group from its start.
    """

    def __init__(self, source: Any, columns: list[str]) -> None:
        self._source = source
        self._columns = columns
        self._parquet = pq.ParquetFile(
            source,
            pre_buffer=False,
            buffer_size=_BUFFER,
            page_checksum_verification=True,
            binary_type=pa.large_binary(),  # else one value that is not UTF-8 spoils a whole dictionary
        )
        metadata = self._parquet.metadata
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._group = -1
        self._position = 0
        self._batches: Iterator[Any] = iter(())
        self._rest: Any = None

    def close(self) -> None:
        """Give the file back; reading is over."""
        self._batches, self._rest = iter(()), None
        self._parquet.close(force=True)
        self._source.close()

    @property
    def row_groups(self) -> Iterator[range]:
        """The rows of each row group."""
        return (range(start, stop) for start, stop in pairwise(self._starts))

    def read(self, rows: range) -> Iterator[tuple[int, Any]]:
        """Batches that cover exactly these rows, each with the position of its first."""
        first = rows.start
        while first < rows.stop:
            self._seek(first)
            batch = self._take(rows.stop - first)
            yield first, batch
            first += batch.num_rows

    def _seek(self, row: int) -> None:
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._position:
            self._start(group)
        while self._position < row:
            self._take(row - self._position)

    def _start(self, group: int) -> None:
        if group >= len(self._starts) - 1:
            raise pa.ArrowInvalid("the file has fewer rows than its manifest says")
        self._group, self._position, self._rest = group, self._starts[group], None
        self._batches = self._parquet.iter_batches(
            self._batch_rows(group), row_groups=[group], columns=self._columns, use_threads=False
        )

    def _batch_rows(self, group: int) -> int:
        """How many rows make a batch of a few megabytes, to the footer's knowledge.

        The size of our columns alone would be closer, but Arrow 26 aborts the process where a corrupt footer has
        nonsense in a column's size statistics.
        """
        metadata = self._parquet.metadata.row_group(group)
        rows: int = metadata.num_rows
        size: int = metadata.total_byte_size
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(size, 1)))

    def _take(self, most: int) -> Any:
        batch = self._rest or next(self._batches, None)
        if batch is None:
            raise pa.ArrowInvalid("a row group ends before its last row")
        self._rest = batch.slice(most) if batch.num_rows > most else None
        batch = batch.slice(0, most)
        self._position += batch.num_rows
        return batch
