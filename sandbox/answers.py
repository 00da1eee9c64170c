"""The answer key: what is right about each known document, found by the SHA-256 of its text."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from sandbox.errors import SandboxError
from sandbox.forms import Answer, Schema


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a key: the right answer, plausible wrong ones, and how hard the document is, in [0, 1]."""

    answer: Answer
    wrong: tuple[Answer, ...] = ()
    hard: float | None = None


class AnswerKey:
    """Lines of JSON files, left on disk: memory holds a digest and a place per line.

    A document may have several lines, one for each job that reads it; the schema of the request tells which.
    """

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._places: dict[bytes, tuple[tuple[int, int, int], ...]] = {}
        self._files = [self._index(path) for path in paths]
        self._order: list[bytes] | None = None
        self._read: OrderedDict[tuple[int, int, int], Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def find(self, sha: bytes, schema: Schema) -> Entry | None:
        """The first line about this document whose answer has the fields that the schema requires."""
        for place in self._places.get(sha, ()):
            entry = self._load(place)
            if schema.covers(entry.answer):
                return entry
        return None

    def after(self, sha: bytes) -> bytes | None:
        """Some other known document: the next by digest, round about."""
        if self._order is None:
            self._order = sorted(self._places)
        others = self._order
        if not others or others == [sha]:
            return None
        return others[bisect_right(others, sha) % len(others)]

    def _index(self, path: Path) -> int:
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SandboxError(f"the answer key {path} cannot be read: {error.strerror}") from None
        offset = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    sha = _sha_of(line, f"{path}:{number}")
                    self._places[sha] = (*self._places.get(sha, ()), (file, offset, len(line)))
                offset += len(line)
        return file

    def _load(self, place: tuple[int, int, int]) -> Entry:
        entry = self._read.get(place)
        if entry is None:
            file, offset, length = place
            entry = _entry(orjson.loads(os.pread(file, length, offset)))
            self._read[place] = entry
            if len(self._read) > 1_000:
                self._read.popitem(last=False)
        return entry

    def close(self) -> None:
        for file in self._files:
            os.close(file)


def _sha_of(line: bytes, where: str) -> bytes:
    try:
        raw = orjson.loads(line)
        sha = bytes.fromhex(raw["sha256"])
        _entry(raw)
    except (ValueError, KeyError, TypeError):
        raise SandboxError(f'{where}: not a line like {{"sha256": hex, "answer": {{...}}}}') from None
    return sha


def _entry(raw: dict[str, Any]) -> Entry:
    return Entry(dict(raw["answer"]), tuple(dict(wrong) for wrong in raw.get("wrong") or ()), raw.get("hard"))
