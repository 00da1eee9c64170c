"""A shelf's readers: each is one borrower's at a time, and none stays open without bound."""

from __future__ import annotations

from typing import Any, cast

from tasks.documents.readers import Reader
from tasks.documents.shelf import ReaderKey, Shelf


class FakeReader:
    is_closed = False

    def close(self) -> None:
        self.is_closed = True


def key(path: str) -> ReaderKey:
    return ("", path, (1, 2), ("id", "text"))


def put(shelf: Shelf, path: str) -> Any:
    reader = FakeReader()
    shelf.put(key(path), cast(Reader, reader))
    return reader


def test_a_reader_is_lent_once_and_only_for_its_own_file() -> None:
    shelf = Shelf(size=2)
    reader = put(shelf, "a")
    taken = [shelf.take(key(path)) for path in ("b", "a", "a")]
    assert taken == [None, reader, None]
    assert not reader.is_closed


def test_a_full_shelf_closes_the_reader_that_was_unused_for_longest() -> None:
    shelf = Shelf(size=2)
    readers = [put(shelf, path) for path in "abc"]
    assert [reader.is_closed for reader in readers] == [True, False, False]
    assert shelf.take(key("a")) is None


def test_of_two_readers_for_the_same_the_later_stays() -> None:
    shelf = Shelf(size=2)
    first, second = put(shelf, "a"), put(shelf, "a")
    assert (first.is_closed, second.is_closed) == (True, False)
    assert shelf.take(key("a")) is second
