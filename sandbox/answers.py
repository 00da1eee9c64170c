"""The answer key: what is right about each known document, found by the SHA-256 of its text."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from sandbox.errormodel import draw
from sandbox.errors import SandboxError
from sandbox.forms import Answer, Schema


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a key: the right answer, plausible wrong ones, and how hard the document is.

    In a key `hard` is any number, larger is harder; here it is the document's rank among its file's, in [0, 1), so
    that each tier keeps its stated share of wrong answers whatever scale a key uses.
    """

    answer: Answer
    wrong: tuple[Answer, ...] = ()
    hard: float | None = None


class AnswerKey:
    """Lines of JSON files, left on disk: memory holds a digest and a place per line.

    A document may have several lines, one for each job that reads it; the schema of the request tells which.
    """

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._places: dict[bytes, tuple[tuple[int, int, int], ...]] = {}
        self._hards: dict[int, list[float]] = {}
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
        offset, hards = 0, []
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    sha, hard = _check(line, f"{path}:{number}")
                    hards += [] if hard is None else [hard]
                    self._places[sha] = (*self._places.get(sha, ()), (file, offset, len(line)))
                offset += len(line)
        self._hards[file] = sorted(hards)
        return file

    def _load(self, place: tuple[int, int, int]) -> Entry:
        entry = self._read.get(place)
        if entry is None:
            file, offset, length = place
            raw = orjson.loads(os.pread(file, length, offset))
            entry = _entry(raw, self._rank(file, raw))
            self._read[place] = entry
            if len(self._read) > 1_000:
                self._read.popitem(last=False)
        return entry

    def _rank(self, file: int, raw: dict[str, Any]) -> float | None:
        """The share of the file's documents that are easier; ties are spread by lot, so ranks are even."""
        hard, hards = raw.get("hard"), self._hards[file]
        if hard is None:
            return None
        low, high = bisect_left(hards, hard), bisect_right(hards, hard)
        return (low + draw(raw["sha256"], "rank") * (high - low)) / len(hards)

    def close(self) -> None:
        for file in self._files:
            os.close(file)


def _check(line: bytes, where: str) -> tuple[bytes, float | None]:
    """The digest and difficulty of a line. Raises SandboxError where it is not a line of a key."""
    try:
        raw = orjson.loads(line)
        hard = raw.get("hard")
        _entry(raw, None)
        return bytes.fromhex(raw["sha256"]), None if hard is None else float(hard)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SandboxError(f'{where}: not a line like {{"sha256": hex, "answer": {{...}}}}') from None


def _entry(raw: dict[str, Any], hard: float | None) -> Entry:
    return Entry(dict(raw["answer"]), tuple(dict(wrong) for wrong in raw.get("wrong") or ()), hard)
