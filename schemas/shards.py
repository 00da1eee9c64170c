"""How a file's rows are cut into shards; alone responsible for where one shard ends and the next begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Cut:
    """A shard before it has its numbers: a range of raw rows, and how many of them are documents."""

    first_row: int
    row_count: int
    document_count: int


def cut_shards(row_groups: Iterable[Sequence[int]], shard_rows: int) -> Iterator[Cut]:
    """Cut a file into shards of 1 to `shard_rows` documents, beginning and ending with a document.

    `row_groups` holds, for each row group in order, the ascending positions in the file of the rows that are
    documents. A reader decodes a row group from its start, so small groups are put together whole and large ones
    are cut into equal parts.
    """
    gathered: Cut | None = None
    for rows in row_groups:
        if not len(rows):
            continue
        if gathered and gathered.document_count + len(rows) <= shard_rows:
            gathered = _join(gathered, rows)
            continue
        if gathered:
            yield gathered
        *full, gathered = _equal_parts(rows, shard_rows)
        yield from full
    if gathered:
        yield gathered


def _join(cut: Cut, rows: Sequence[int]) -> Cut:
    return Cut(cut.first_row, rows[-1] + 1 - cut.first_row, cut.document_count + len(rows))


def _equal_parts(rows: Sequence[int], shard_rows: int) -> Iterator[Cut]:
    count = -(-len(rows) // shard_rows)
    edges = [len(rows) * part // count for part in range(count + 1)]
    for start, stop in pairwise(edges):
        yield Cut(rows[start], rows[stop - 1] + 1 - rows[start], stop - start)
