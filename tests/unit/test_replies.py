"""Whatever a 200 holds, it becomes a reply or an error that the door knows: nothing is trusted to have a type."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.attempts import Signal
from schemas.replies import Arrival, read_date, read_reply, read_retry_after

NOW = datetime(2026, 11, 24, 9, 0, 30, tzinfo=UTC)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
TOKEN = {"token": "{}", "logprob": -0.5, "bytes": [123, 125]}
COMPLETION: dict[str, Any] = {
    "id": "1",
    "model": "deepseek-flash",
    "system_fingerprint": "fp",
    "choices": [
        {
            "message": {"content": "{}", "tool_calls": [{"function": {"arguments": "{}"}}]},
            "finish_reason": "stop",
            "logprobs": {"content": [TOKEN]},
        }
    ],
    "usage": {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "prompt_cache_hit_tokens": 1,
        "prompt_cache_miss_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 1},
    },
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for name, child in children for place in places(child, (*path, name)))]


def planted(path: tuple[Any, ...], junk: Any) -> Any:
    whole = json.loads(json.dumps(COMPLETION))
    if not path:
        return junk
    spot = whole
    for name in path[:-1]:
        spot = spot[name]
    spot[path[-1]] = junk
    return whole


def arrival(body: bytes, status: int = 200) -> Arrival:
    return Arrival(status, body, None, NOW, NOW)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(
    path=st.sampled_from(places(COMPLETION)), junk=JUNK, status=st.sampled_from([200, 200, 200, 400, 429, 500, 599])
)
def test_junk_in_any_one_place_becomes_a_reply(path: tuple[Any, ...], junk: Any, status: int) -> None:
    reply = read_reply(arrival(json.dumps(planted(path, junk)).encode(), status))
    assert (reply.content is None) or reply.signal in (Signal.ANSWERED, Signal.TRUNCATED)
    assert reply.tokens is None or "".join(token.text for token in reply.tokens) == reply.content
    if reply.usage is not None:
        assert min(reply.usage.hit, reply.usage.miss, reply.usage.output, reply.usage.reasoning) >= 0


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.binary(max_size=60) | st.text('{}[]",:1e\\u \n', max_size=40).map(str.encode))
def test_any_bytes_become_a_reply_or_an_error_the_door_knows(body: bytes) -> None:
    with suppress(ValueError, RecursionError):
        read_reply(arrival(body))
    assert read_reply(arrival(body, 500)).signal in (Signal.FAILED, Signal.UNAVAILABLE)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("inf", 86400.0),
        ("Tue, 24 Nov 2026 09:01:00 GMT", 30.0),
        ("Tue, 24 Nov 2026 08:00:00 GMT", 0.0),
    ],
)
def test_a_retry_after_is_seconds_or_a_date_and_bounded(header: str | None, seconds: float | None) -> None:
    assert read_retry_after(header, NOW) == seconds


def test_a_date_in_another_zone_or_none_is_utc() -> None:
    assert read_date("Tue, 24 Nov 2026 10:00:30 +0100", NOW) == NOW
    assert read_date("Tue, 24 Nov 2026 09:00:30 -0000", NOW) == NOW
    assert read_date("Sat, 21 Nov 2026 09:00:30 GMT", NOW) is None
