"""Confidence as token probabilities: the wire form of `logprobs.content`, made from pre-serialised pieces.

A field's confidence sits on the one token where its value parts from the likeliest other value; the product over
the value's tokens is that confidence, and structural tokens are all but certain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from sandbox.tokens import pieces

TOP = 20
_SURE = -1e-6


@dataclass(frozen=True, slots=True)
class Span:
    """Where a field's value lies in the content (bytes), how sure the model is of it, and what else it weighed."""

    start: int
    value: Any
    confidence: float
    others: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """One token with the alternatives that were likelier than noise, best first, itself left out."""

    piece: bytes
    logprob: float
    others: tuple[tuple[bytes, float], ...] = ()


def score(content: str, spans: Iterable[Span]) -> list[Scored]:
    """The content's tokens; one token of each span carries the span's confidence."""
    tokens = pieces(content)
    ends: list[int] = []
    for piece in tokens:
        ends.append((ends[-1] if ends else 0) + len(piece))
    scored = [Scored(piece, _SURE) for piece in tokens]
    for span in spans:
        offset, others = _parting(span.value, span.others)
        at = next((i for i, end in enumerate(ends) if end > span.start + offset), len(tokens) - 1)
        shares = _share(span.confidence, [other for other in others if other != tokens[at]])
        scored[at] = Scored(tokens[at], math.log(span.confidence), shares)
    return scored


def _parting(value: Any, others: Iterable[Any]) -> tuple[int, list[bytes]]:
    """The byte offset in the value's JSON where it parts from its rivals, and the rivals' tokens there."""
    own, quote = _inside(value)
    place: int | None = None
    rivals: list[bytes] = []
    for other in others:
        theirs, _ = _inside(other)
        parts = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), None)
        if parts is not None and place in (None, parts):
            place = parts
            if theirs[parts] not in rivals:
                rivals.append(theirs[parts])
    return quote + sum(len(piece) for piece in own[: place or 0]), rivals


@lru_cache(maxsize=4096)
def _cut(text: str) -> tuple[bytes, ...]:
    return tuple(pieces(text))


def _inside(value: Any) -> tuple[tuple[bytes, ...], int]:
    text = json.dumps(value, ensure_ascii=False)
    return (_cut(text[1:-1]), 1) if isinstance(value, str) else (_cut(text), 0)


def _share(confidence: float, others: list[bytes]) -> tuple[tuple[bytes, float], ...]:
    """Split what is left among the rivals, none likelier than the token that was chosen."""
    left = 1 - confidence
    shares = []
    for rank, other in enumerate(others[: TOP - 1]):
        share = min(left * 0.7, confidence * 0.98)
        left -= share
        shares.append((other, math.log(max(share, 1e-12)) - rank * 1e-9))
    return tuple(sorted(shares, key=lambda pair: -pair[1]))


def encode_logprobs(tokens: Iterable[Scored], top: int) -> bytes:
    """`{"content": [...]}` with `top` alternatives per token, the chosen one among them."""
    return b'{"content":[' + b",".join(_encode(token, top) for token in tokens) + b"]}"


def _encode(token: Scored, top: int) -> bytes:
    own = _entry(token.piece, token.logprob)
    ranked = [own, *(_entry(piece, logprob) for piece, logprob in token.others)]
    listed = [*ranked, *_noise()][:top]
    return own[:-1] + b',"top_logprobs":[' + b",".join(listed) + b"]}"


@lru_cache(maxsize=16_384)
def _entry(piece: bytes, logprob: float) -> bytes:
    return orjson.dumps({"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)})


@lru_cache(maxsize=1)
def _noise() -> tuple[bytes, ...]:
    """Tokens of no consequence that fill a list up to its length."""
    return tuple(_entry(letter.encode(), -18.0 - 0.5 * rank) for rank, letter in enumerate("abcdefghijklmnopqrstu"))
