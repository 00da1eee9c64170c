"""Pins: alone responsible for reading rows only from the very bytes that a run was planned on (G1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from schemas.documents import InputFile
from schemas.errors import InputChanged, InputUnreadable
from tasks.documents import trail
from tasks.documents.digests import require_unchanged
from tasks.documents.faults import UNREADABLE, first_line, is_stores_fault
from tasks.documents.places import Place, Signature
from tasks.documents.readers import Reader, open_reader
from tasks.documents.shelf import Shelf

_shelf = Shelf(size=4)


def read_pinned(place: Place, file: InputFile, rows: range, columns: tuple[str, ...]) -> Iterator[Any]:
    """Batches of a file that is the manifest's before the first one, and has not been touched by each one after.

    Raises InputChanged where it is not, InputUnreadable where its bytes cannot be read.
    """
    trail.mark(file.path)
    path = place.locate(file.path)
    signature = require_unchanged(place, file)
    with _corruption(place, file), _borrow(place, path, signature, columns) as reader:
        for _, batch in reader.read(rows):
            if place.sign(path) != signature:
                raise InputChanged(f"{file.path}: changed while it was being read; start a new run for the new file")
            yield batch


@contextmanager
def _borrow(place: Place, path: str, signature: Signature, columns: tuple[str, ...]) -> Iterator[Reader]:
    """A reader for the duration of a shard; one that failed is not used again."""
    key = (place.key, path, signature, columns)
    reader = _shelf.take(key) or open_reader(place, path, columns)
    try:
        yield reader
    except GeneratorExit:  # the shard was given up half way, which does the reader no harm
        _shelf.put(key, reader)
        raise
    except BaseException:
        reader.close()
        raise
    _shelf.put(key, reader)


@contextmanager
def _corruption(place: Place, file: InputFile) -> Iterator[None]:
    """What cannot be read is corrupt, unless the file has changed since or its store failed."""
    try:
        yield
    except UNREADABLE as error:
        require_unchanged(place, file)
        if is_stores_fault(error):
            raise
        raise InputUnreadable(
            f"{file.path}: is corrupt: {first_line(error)}; write the file anew, start a new run"
        ) from error
