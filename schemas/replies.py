"""What a reply from the provider means: the one place where a status and a body become a `Reply`.

Nothing in here trusts the provider: every field is checked before it is kept, and what cannot be true is
unknown, never zero. The table of signals is the design's (`ledger.md`, "What a reply means").

Decisions where the API says nothing:

- Cache hits that are not reported make the whole usage unknown, because a guess would be booked as a fact.
  (vLLM reports them only with `--enable-prompt-tokens-details`.)
- A finish reason that nobody documents is an interruption: the text may not be whole, so it is discarded.
- Any redirect is a wrong base URL, like 404: the door never follows one, because it would carry the key along.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache

import orjson

from schemas.attempts import Reply, Signal, Token, Usage
from schemas.tokens import read_tokens

#: A Date header further than this from the local clock is nonsense, not a clock that is off.
DATE_TOLERANCE = timedelta(days=1)
#: The longest Retry-After that is kept; what is waited is bounded again, and lower, by whoever waits.
RETRY_AFTER_LIMIT_S = 24 * 3600.0
#: More tokens than any context holds; above it a count is a fault (and would not fit the ledger's columns).
TOKENS_LIMIT = 2**31 - 1
#: Only this much of an error body is searched for a known phrase.
_ERROR_TEXT_BYTES = 64 * 1024
_CEILING = re.compile(r"concurrency limit\D{0,20}(\d{1,6})", re.IGNORECASE)
_SAFE_WORD = re.compile(r"[a-z][a-z_]{1,48}|[1-9]\d{2}")
_PHRASES = (
    "Content Exists Risk",
    "Insufficient Balance",
    "Authentication Fails",
    "Model Not Exist",
    "maximum context length",
    "exceeds the available context size",
)

_FINISHES = {
    "stop": Signal.ANSWERED,
    "tool_calls": Signal.ANSWERED,
    "length": Signal.TRUNCATED,
    "content_filter": Signal.REFUSED,
    "insufficient_system_resource": Signal.INTERRUPTED,
    "aborted": Signal.INTERRUPTED,
}
_STATUSES = {
    401: Signal.UNAUTHORISED,
    402: Signal.NO_BALANCE,
    403: Signal.UNAUTHORISED,
    404: Signal.UNAUTHORISED,
    405: Signal.UNAUTHORISED,
    407: Signal.UNAUTHORISED,
    425: Signal.UNAVAILABLE,
    429: Signal.RATE_LIMITED,
    502: Signal.UNAVAILABLE,
    503: Signal.UNAVAILABLE,
    529: Signal.UNAVAILABLE,
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One whole HTTP reply as it came off the wire, with the instants that belong to it."""

    status: int
    body: bytes
    retry_after: str | None
    sent_at: datetime
    completed_at: datetime


@dataclass(slots=True)
class _Reading:
    """What has been understood of a reply so far; only the known fields reach the `Reply`."""

    signal: Signal
    content: str | None = None
    tokens: tuple[Token, ...] | None = None
    usage: Usage | None = None
    usage_fault: str | None = None
    finish_reason: str | None = None
    served_model: str | None = None
    fingerprint: str | None = None
    provider_id: str | None = None
    ceiling: int | None = None
    detail: str = ""


class MissingUsage(ValueError):
    """There is no usage block, or it lacks what is billed; the message says which, and holds only field names."""


class ImpossibleUsage(ValueError):
    """The usage block says what cannot be; the message says what, and holds only field names."""


def read_reply(arrival: Arrival) -> Reply:
    """What one whole HTTP reply came to. Raises ValueError or RecursionError where a 200's body is cut or broken."""
    if arrival.status == 200:
        reading = _read_completion(load_json(arrival.body))
    else:
        reading = _read_error(arrival.status, arrival.body)
    return Reply(
        signal=reading.signal,
        sent_at=arrival.sent_at,
        completed_at=arrival.completed_at,
        http_status=arrival.status,
        content=reading.content,
        tokens=reading.tokens,
        usage=reading.usage,
        usage_fault=reading.usage_fault,
        finish_reason=reading.finish_reason,
        served_model=reading.served_model,
        fingerprint=reading.fingerprint,
        provider_id=reading.provider_id,
        retry_after_s=read_retry_after(arrival.retry_after, arrival.completed_at),
        ceiling=reading.ceiling,
        detail=reading.detail,
    )


class NotJson(ValueError):
    """A whole body that is no JSON and was never going to be: HTML, or plain text."""


def load_json(body: bytes) -> object:
    """The JSON value in a body, past leading blank lines and a byte order mark.

    Raises NotJson for HTML and text, UnicodeDecodeError for bad UTF-8, ValueError for cut JSON. A reply that
    only the strict parser refuses (a lone surrogate, NaN) was paid for, so it is read by the lenient one.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return _load_leniently(body)


def _load_leniently(body: bytes) -> object:
    text = body.decode("utf-8").lstrip("\ufeff \r\n\t")
    if not text:
        raise ValueError("empty body")
    if text[0] not in '{["':
        raise NotJson("not JSON")
    return json.loads(text)


def _read_completion(value: object) -> _Reading:
    if not isinstance(value, dict):
        return _Reading(Signal.MALFORMED, detail=f"200 with {_json_type(value)} instead of a completion")
    if value.get("error") is not None:
        return _Reading(Signal.MALFORMED, detail=_join("200 with an error object", *_error_words(value)))
    if not value.keys() & {"choices", "usage"}:
        return _Reading(Signal.MALFORMED, detail="200 with an object that is no completion")
    reading = _read_choice(value.get("choices"))
    reading.served_model = _short_text(value.get("model"))
    reading.fingerprint = _short_text(value.get("system_fingerprint"))
    reading.provider_id = _short_text(value.get("id"))
    try:
        reading.usage = read_usage(value.get("usage"))
    except MissingUsage as gap:
        reading.detail = _join(reading.detail, str(gap))
    except ImpossibleUsage as problem:
        reading.usage_fault = str(problem)
        reading.detail = _join(reading.detail, reading.usage_fault)
    return reading


def _read_choice(choices: object) -> _Reading:
    if choices is None or choices == []:
        return _Reading(Signal.BLANK, detail="no choices")
    choice = choices[0] if isinstance(choices, list) else choices
    if not isinstance(choices, list) or not isinstance(choice, dict):
        return _Reading(Signal.MALFORMED, detail="choices is not a list of objects")
    message = choice.get("message")
    content = _answer_text(message) if isinstance(message, dict) else message
    if content is not None and not isinstance(content, str):
        return _Reading(Signal.MALFORMED, detail="the message is not text")
    return _read_finish(choice, content)


def _answer_text(message: Mapping[str, object]) -> object:
    """The answer: the arguments of the one strict function where the tier uses tools, else the content."""
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls and isinstance(calls[0], dict):
        function = calls[0].get("function")
        return function.get("arguments") if isinstance(function, dict) else None
    return message.get("content")


def _read_finish(choice: Mapping[str, object], content: str | None) -> _Reading:
    reason = choice.get("finish_reason")
    known = _FINISHES.get(reason) if isinstance(reason, str) else None
    signal = known or Signal.INTERRUPTED
    reading = _Reading(signal, finish_reason=_short_text(reason), detail="" if known else "unknown finish_reason")
    if signal is Signal.ANSWERED and (content is None or not content.strip()):
        reading.signal = Signal.BLANK
    elif signal in (Signal.ANSWERED, Signal.TRUNCATED) and content is not None:
        reading.content = _without_surrogates(content)
        reading.tokens = read_tokens(choice.get("logprobs"), reading.content)
    return reading


def _without_surrogates(content: str) -> str:
    """The text with lone surrogates replaced: nothing after us can encode them."""
    return content if content.isascii() else content.encode("utf-8", "replace").decode("utf-8")


def read_usage(block: object) -> Usage:
    """The billed tokens. Raises MissingUsage or ImpossibleUsage.

    Strict, because it becomes money: integers >= 0 only, hit + miss == prompt, reasoning <= output.
    """
    if not isinstance(block, dict):
        raise MissingUsage("usage is missing")
    prompt = _count(block, "prompt_tokens")
    output = _count(block, "completion_tokens")
    if prompt is None or output is None:
        raise MissingUsage("usage lacks prompt_tokens or completion_tokens")
    hit = _hits(block)
    if hit is None:
        raise MissingUsage("usage does not report cache hits")
    miss = _count(block, "prompt_cache_miss_tokens")
    miss = prompt - hit if miss is None else miss
    if miss < 0 or hit + miss != prompt:
        raise ImpossibleUsage("usage is inconsistent: hit + miss is not prompt_tokens")
    reasoning = _detail_count(block, "completion_tokens_details", "reasoning_tokens") or 0
    if reasoning > output:
        raise ImpossibleUsage("usage is inconsistent: reasoning_tokens exceeds completion_tokens")
    return Usage(hit=hit, miss=miss, output=output, reasoning=reasoning)


def _hits(block: Mapping[str, object]) -> int | None:
    """Cached prompt tokens under DeepSeek's name or OpenAI's; both, where both are there, must agree."""
    own = _count(block, "prompt_cache_hit_tokens")
    other = _detail_count(block, "prompt_tokens_details", "cached_tokens")
    if own is not None and other is not None and own != other:
        raise ImpossibleUsage("usage is inconsistent: prompt_cache_hit_tokens is not cached_tokens")
    return other if own is None else own


def _count(block: Mapping[str, object], name: str) -> int | None:
    value = block.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= TOKENS_LIMIT:  # bool is an int to isinstance
        raise ImpossibleUsage(f"usage is impossible: {name}")
    return value


def _detail_count(block: Mapping[str, object], details: str, name: str) -> int | None:
    inner = block.get(details)
    if inner is None:
        return None
    if not isinstance(inner, dict):
        raise ImpossibleUsage(f"usage is impossible: {details}")
    return _count(inner, name)


def _read_error(status: int, body: bytes) -> _Reading:
    text = body[:_ERROR_TEXT_BYTES].decode("utf-8", "replace")
    error = _own_error(body)
    signal = _error_signal(status, is_own=error is not None, text=text)
    phrases = [phrase for phrase in _PHRASES if phrase.lower() in text.lower()]
    reading = _Reading(signal, detail=_join(f"HTTP {status}", *_error_words(error or {}), *phrases))
    if signal is Signal.RATE_LIMITED and (limit := _CEILING.search(text)) and int(limit[1]) > 0:
        reading.ceiling = int(limit[1])
        reading.detail = _join(reading.detail, f"concurrency limit of {reading.ceiling}")
    return reading


def _error_signal(status: int, *, is_own: bool, text: str) -> Signal:
    if status == 400 and "content exists risk" in text.lower():
        return Signal.REFUSED
    if status in _STATUSES:
        return _STATUSES[status]
    if 200 <= status < 300:
        return Signal.MALFORMED
    if status < 400:
        return Signal.UNAUTHORISED
    if status >= 500 or status in (408, 499):  # a gateway gave up on a request that may still be running
        return Signal.UNAVAILABLE if is_own else Signal.FAILED
    return Signal.REJECTED


def _own_error(body: bytes) -> dict[str, object] | None:
    """The body, if it is the provider's own error JSON: `{"error": {"message": …, "type" or "code": …}}`."""
    try:
        value = load_json(body)
    except (ValueError, RecursionError):
        return None
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(value, dict) and isinstance(error, dict) and "message" in error and error.keys() & {"type", "code"}:
        return value
    return None


def _error_words(value: Mapping[str, object]) -> list[str]:
    """An error's type and code if they look like identifiers; its message may quote the document, so never that."""
    error = value.get("error")
    if not isinstance(error, dict):
        return []
    words = [str(error.get("type")), str(error.get("code"))]
    return [word for word in dict.fromkeys(words) if _SAFE_WORD.fullmatch(word) and word != "None"]


def read_date(header: str | None, now: datetime, *, tolerance: timedelta = DATE_TOLERANCE) -> datetime | None:
    """The instant in a Date header (UTC, whole seconds), or None where it is absent, broken or absurd."""
    instant = _parse_date(header) if header else None
    return instant if instant is not None and abs(instant - now) <= tolerance else None


@lru_cache(maxsize=256)  # thousands of replies carry the same second
def _parse_date(header: str) -> datetime | None:
    try:
        instant = parsedate_to_datetime(header)
    except (ValueError, TypeError, OverflowError):
        return None
    return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)


def read_retry_after(header: str | None, now: datetime) -> float | None:
    """Seconds to wait from now by a Retry-After header (seconds or a date), at least 0 and bounded; else None."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        instant = _parse_date(header)
        if instant is None:
            return None
        seconds = (instant - now).total_seconds()
    return None if math.isnan(seconds) else min(max(0.0, seconds), RETRY_AFTER_LIMIT_S)


def _short_text(value: object) -> str | None:
    """A name the provider gave, short and printable enough to store; anything else is not a name."""
    return value if isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable() else None


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
