"""Tokens of an answer: from the provider's logprobs to texts that, joined, are exactly the content."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence

from schemas.attempts import Token

#: Rounding may lift the logarithm of a probability of one above zero by this much, no more.
_ABOVE_ZERO = 1e-4


class _Misaligned(ValueError):
    """The token list is no account of the content."""


def read_tokens(logprobs: object, content: str) -> tuple[Token, ...] | None:
    """The content's tokens with their natural log probabilities, or None where they do not add up to it.

    Tokens that split one character are joined into one, their logarithms added, so that every text is whole.
    A tail that the content does not show (an end-of-sequence token) is left out.
    """
    listed = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(listed, list) or not content:
        return None
    try:
        tokens = _plain(listed)
        if "".join(token.text for token in tokens) != content:
            tokens = _covering(list(_joined(listed)), content)
    except (_Misaligned, UnicodeDecodeError):
        return None
    return tuple(tokens)


def _plain(listed: Sequence[object]) -> list[Token]:
    return [Token(_text(entry), _logprob(entry)) for entry in listed]


def _text(entry: object) -> str:
    text = entry.get("token") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise _Misaligned
    return text


def _logprob(entry: object) -> float:
    value = entry.get("logprob") if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Misaligned
    if not math.isfinite(value) or value > _ABOVE_ZERO:
        raise _Misaligned
    return min(float(value), 0.0)


def _octets(entry: object) -> bytes:
    """A token's bytes: as listed, or of its text where the server lists none."""
    listed = entry.get("bytes") if isinstance(entry, dict) else None
    if listed is None:
        return _text(entry).encode("utf-8", "surrogatepass")
    if not isinstance(listed, list) or not all(type(octet) is int and 0 <= octet < 256 for octet in listed):
        raise _Misaligned
    return bytes(listed)


def _joined(listed: Sequence[object]) -> Iterator[Token]:
    """Tokens decoded from their bytes; those that share a character come out as one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, logprob = "", 0.0
    for entry in listed:
        text += decoder.decode(_octets(entry))
        logprob += _logprob(entry)
        if not decoder.getstate()[0]:
            yield Token(text, logprob)
            text, logprob = "", 0.0
    decoder.decode(b"", final=True)


def _covering(tokens: Sequence[Token], content: str) -> list[Token]:
    """The tokens up to the content's end; the end must fall between two of them."""
    end, kept = 0, []
    for token in tokens:
        if end == len(content):
            break
        if not content.startswith(token.text, end):
            raise _Misaligned
        kept.append(token)
        end += len(token.text)
    if end != len(content):
        raise _Misaligned
    return kept
