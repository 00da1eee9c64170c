"""Reading: alone responsible for a shard's rows becoming documents, numbered as the manifest numbers them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pyarrow.fs

from schemas.documents import Document, InputFile, Manifest, Shard, UnfitDocument
from schemas.errors import ConfigurationError, InputChanged, Problem
from schemas.fitness import Cell, judge_row
from schemas.jobs import Input
from tasks.documents.cells import choose, to_cells
from tasks.documents.faults import reading_faults
from tasks.documents.filters import Filter
from tasks.documents.pins import read_pinned
from tasks.documents.places import Place, find_place


def read_shard(
    input: Input,
    file: InputFile,
    shard: Shard,
    *,
    root: Path = Path("."),
    filesystem: pyarrow.fs.FileSystem | None = None,
) -> Iterator[Document | UnfitDocument]:
    """The shard's documents in order, streamed; a row that cannot be sent comes as an UnfitDocument in its place.

    Raises InputChanged, at the first document if it can be known by then, when the file is gone, corrupt or not the
    manifest's, or when the job's filter selects other rows than planned; InputUnavailable when the store is down.
    """
    with reading_faults():
        yield from read_documents(find_place(input.path, root, filesystem), input, file, shard)


def read_labels(
    input: Input, manifest: Manifest, *, root: Path = Path("."), filesystem: pyarrow.fs.FileSystem | None = None
) -> Iterator[tuple[int, str | None]]:
    """Every document's number with its label, None where the row has none. Labels are spelled as JSON spells them.

    Raises what `read_shard` raises, and ConfigurationError where the job names no label column.
    """
    if input.label is None:
        raise ConfigurationError(
            Problem("input.label", "names no column; without labels there is nothing to measure")
        )
    with reading_faults():
        place = find_place(input.path, root, filesystem)
        for shard in manifest.shards:
            file = manifest.files[shard.file_no]
            for number, (labels,) in _read_cells(place, input, file, shard, (input.label,)):
                yield from enumerate(map(_spell, labels), start=number)


def _spell(label: Cell) -> str | None:
    return label.decode("utf-8", "replace") if isinstance(label, bytes) else label


def read_documents(place: Place, input: Input, file: InputFile, shard: Shard) -> Iterator[Document | UnfitDocument]:
    """What `read_shard` reads, from a place that was found already."""
    for number, (ids, texts) in _read_cells(place, input, file, shard, (input.id, input.text)):
        yield from map(judge_row, count(number), ids, texts)


def _read_cells(
    place: Place, input: Input, file: InputFile, shard: Shard, columns: tuple[str, ...]
) -> Iterator[tuple[int, list[list[Cell]]]]:
    """The columns' values in the shard's rows that pass the filter, with the number of the first document in each."""
    conditions = Filter(input)
    number, end = shard.first_document_no, shard.first_document_no + shard.document_count
    rows = range(shard.first_row, shard.first_row + shard.row_count)
    for batch in read_pinned(place, file, rows, (*columns, *conditions.columns)):
        chosen = [batch.column(name) for name in columns]
        if conditions:
            positions = conditions.select(batch)
            chosen = [choose(column, positions) for column in chosen]
        following = number + len(chosen[0])
        _require_planned(following <= end, file)
        yield number, [to_cells(column) for column in chosen]
        number = following
    _require_planned(number == end, file)


def _require_planned(is_planned: bool, file: InputFile) -> None:
    if not is_planned:
        raise InputChanged(
            f"{file.path}: the filter selects other rows than planned; start a new run for the new job"
        )
