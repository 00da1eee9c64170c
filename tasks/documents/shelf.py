"""The shelf: alone responsible for readers that stay open between two shards of a file."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TypeAlias

from tasks.documents.places import Signature
from tasks.documents.readers import Reader

#: Place, path, signature and columns: what makes one reader as good as another.
ReaderKey: TypeAlias = tuple[str, str, Signature, tuple[str, ...]]


class Shelf:
    """Open readers between two shards, so that the next shard of a file goes on where the last one ended."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._readers: OrderedDict[ReaderKey, Reader] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: ReaderKey) -> Reader | None:
        """The reader for exactly this file and these columns, now the caller's alone."""
        with self._lock:
            return self._readers.pop(key, None)

    def put(self, key: ReaderKey, reader: Reader) -> None:
        """Keep a reader for the next shard; an equal one, or else the one unused for longest, is closed."""
        with self._lock:
            surplus = self._readers.pop(key, None)
            self._readers[key] = reader
            if len(self._readers) > self._size:
                _, surplus = self._readers.popitem(last=False)
        if surplus is not None:
            surplus.close()
