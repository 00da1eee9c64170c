"""Duplicates: alone responsible for which documents have an id that an earlier one has.

Ids themselves would not fit in memory, so each has a 64-bit hash; documents whose hash is repeated are read again.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from schemas.documents import Document, Duplicate, Manifest
from schemas.errors import ConfigurationError, Problem
from schemas.fitness import Cell
from schemas.jobs import Input
from tasks.documents.places import Place
from tasks.documents.reading import read_documents

#: An id column is judged only when so many documents share an id with another.
_JUDGED_FROM = 1000


def hash_ids(ids: Sequence[Cell], first_document_no: int) -> Iterator[int]:
    """Hashes of the ids of documents in a row; one that can be no document's gets a hash of its own."""
    for number, document_id in enumerate(ids, start=first_document_no):
        yield hash(document_id if isinstance(document_id, str) else (number, "unfit"))


def find_duplicates(place: Place, input: Input, manifest: Manifest, hashes: array[int]) -> tuple[Duplicate, ...]:
    """Documents whose id an earlier one has: found by hash, proven by reading those few again.

    `hashes` are the documents' in order. Raises ConfigurationError if the id column names no documents.
    """
    repeated = _find_repeated(hashes)
    _refuse_constant_id(input.id, repeated, hashes)
    originals: dict[str, tuple[int, bytes]] = {}
    duplicates = []
    for document in _read_again(place, input, manifest, repeated):
        number, digest = document.document_no, document.text_digest
        of_number, of_digest = originals.setdefault(document.document_id, (number, digest))
        if of_number != number:
            duplicates.append(Duplicate(number, of_number, digest == of_digest))
    return tuple(duplicates)


def _find_repeated(hashes: array[int]) -> list[int]:
    """Positions of the values that occur more than once."""
    values = pa.Array.from_buffers(pa.int64(), len(hashes), [None, pa.py_buffer(hashes)])
    ordered = values.take(pc.array_sort_indices(values))
    repeated = ordered[1:].filter(pc.equal(ordered[1:], ordered[:-1]))
    return list(pc.indices_nonzero(pc.is_in(values, value_set=repeated)).to_pylist())


def _refuse_constant_id(column: str, repeated: Sequence[int], hashes: array[int]) -> None:
    different = len(hashes) - len(repeated) + len({hashes[number] for number in repeated})
    if len(repeated) >= _JUDGED_FROM and 10 * different < len(hashes):
        what = f"column {column!r} has {different} values for {len(hashes)} documents, so it names none of them"
        raise ConfigurationError(Problem("input.id", f"{what}; choose a column that does, or fewer partitions"))


def _read_again(place: Place, input: Input, manifest: Manifest, numbers: Sequence[int]) -> Iterator[Document]:
    """The documents with these numbers that are fit to be sent; only shards that hold one are read."""
    for shard in manifest.shards:
        start = bisect_left(numbers, shard.first_document_no)
        stop = bisect_left(numbers, shard.first_document_no + shard.document_count)
        if start == stop:
            continue
        wanted = set(numbers[start:stop])
        for document in read_documents(place, input, manifest.files[shard.file_no], shard):
            if document.document_no in wanted and isinstance(document, Document):
                yield document
