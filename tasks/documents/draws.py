"""Draws: alone responsible for drawing a sample, in one pass over every document of a manifest that can be sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs

from schemas.documents import Document, InputFile, Manifest, Shard
from schemas.fitness import judge_row
from schemas.jobs import Input
from schemas.samples import Design, Draw, Place, Sample
from tasks.documents.cells import choose, to_cells
from tasks.documents.faults import reading_faults
from tasks.documents.filters import Filter
from tasks.documents.pins import read_pinned
from tasks.documents.places import Place as Store
from tasks.documents.places import find_place


def draw(
    input: Input,
    manifest: Manifest,
    design: Design,
    *,
    root: Path = Path("."),
    filesystem: pyarrow.fs.FileSystem | None = None,
) -> Sample:
    """A sample of the documents that a run of this manifest would send: fit to be sent, and no duplicates.

    Memory holds a few rows and the sample. Raises what `read_shard` raises.
    """
    found, number = Draw(design.size, design.is_even), 0
    duplicates = {duplicate.document_no for duplicate in manifest.duplicates}
    with reading_faults():
        store = find_place(input.path, root, filesystem)
        for shard in manifest.shards:
            file = manifest.files[shard.file_no]
            for row, document_id, text in _rows(store, input, file, shard):
                document = judge_row(number, document_id, text)
                if isinstance(document, Document) and number not in duplicates:
                    place, weight = Place(file.file_no, row), design.weigh(document.text)
                    found.offer(place, weight, design.number(document.document_id))
                number += 1
    return found.end()


def _rows(store: Store, input: Input, file: InputFile, shard: Shard) -> Iterator[tuple[int, Any, Any]]:
    """The rows of a shard that pass the filter: their position in the file, id and text."""
    conditions, first = Filter(input), shard.first_row
    rows = range(first, first + shard.row_count)
    for batch in read_pinned(store, file, rows, (input.id, input.text, *conditions.columns)):
        columns = [batch.column(name) for name in (input.id, input.text)]
        positions: Any = range(batch.num_rows)
        if conditions:
            chosen = conditions.select(batch)
            columns, positions = [choose(column, chosen) for column in columns], chosen.to_pylist()
        ids, texts = (to_cells(column) for column in columns)
        yield from zip((first + position for position in positions), ids, texts, strict=True)
        first += batch.num_rows
