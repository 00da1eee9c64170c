"""Where each value of a JSON answer stands in the text it was read from.

The standard parser forgets positions, and confidence needs them: a value's tokens are found by its characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

#: Deeper JSON is not followed: no answer that deep is accepted either.
DEEPEST = 100
_LEXEME = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of characters."""

    start: int
    end: int


class _NotJson(ValueError):
    """The text is no JSON object, so its values have no place."""


def leaf_spans(content: str) -> dict[str, Span]:
    """Dotted path → span of every value in the content's JSON object that holds no other value.

    A list's items count as `path.0`, `path.1` …; a string's span leaves its quotes out unless it is empty; an
    empty list or object is one value, brackets and all. Of a key given twice the last counts. What stands before
    the object (a Markdown fence) is skipped. Empty where the content holds no whole object.
    """
    try:
        return dict(_Scan(content).leaves())
    except _NotJson:
        return {}


class _Scan:
    """One pass over the lexemes of a text, from its first brace on."""

    def __init__(self, content: str) -> None:
        start = content.find("{")
        if start < 0:
            raise _NotJson
        self._lexemes = _LEXEME.finditer(content, start)
        self._now = next(self._lexemes)

    def leaves(self) -> dict[str, Span]:
        return self._value("", DEEPEST)

    def _value(self, path: str, depth_left: int) -> dict[str, Span]:
        """The leaves of the value that begins at the current lexeme, which moves on to the value's last one."""
        begin, text = self._now, self._now.group()
        if depth_left == 0 or text in ("}", "]", ",", ":"):
            raise _NotJson
        if text not in ("{", "["):
            quote = 1 if text[0] == '"' and len(text) > 2 else 0
            return {path: Span(begin.start() + quote, begin.end() - quote)}
        inner = self._members(path, depth_left - 1) if text == "{" else self._items(path, depth_left - 1)
        return inner or {path: Span(begin.start(), self._now.end())}

    def _members(self, path: str, depth_left: int) -> dict[str, Span]:
        members: dict[str, dict[str, Span]] = {}  # by key, so that the last of a key given twice replaces the first
        for _ in self._separated("}"):
            key = _key(self._now.group())
            self._step(":")
            self._step()
            members[key] = self._value(_join(path, key), depth_left)
        return {name: span for leaves in members.values() for name, span in leaves.items()}

    def _items(self, path: str, depth_left: int) -> dict[str, Span]:
        leaves: dict[str, Span] = {}
        for index in self._separated("]"):
            leaves |= self._value(_join(path, str(index)), depth_left)
        return leaves

    def _separated(self, closing: str) -> Iterator[int]:
        """Stop at the first lexeme of every element, then at the closing bracket."""
        index = 0
        while self._step() != closing:
            yield index
            index += 1
            if self._step() == closing:
                return
            if self._now.group() != ",":
                raise _NotJson

    def _step(self, expected: str | None = None) -> str:
        found = next(self._lexemes, None)
        if found is None or (expected is not None and found.group() != expected):
            raise _NotJson
        self._now = found
        return found.group()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _key(lexeme: str) -> str:
    try:
        key = json.loads(lexeme, strict=False)
    except ValueError:
        raise _NotJson from None
    if not isinstance(key, str):
        raise _NotJson
    return key
